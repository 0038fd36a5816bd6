// Runs a loop with the widest vectors this processor has: one body, compiled for three instruction sets.
#pragma once

namespace whipstaff {

// Sanitizers watch what a loop does, not how wide it is: one version is enough for them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)

// `flatten` inlines the whole body into each of these, where the compiler vectorises it for that instruction set.
template <class Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512"), flatten)) void
run_avx512(const Body& body) {
  body();
}

template <class Body>
__attribute__((target("avx2,fma,bmi,bmi2"), flatten)) void run_avx2(const Body& body) {
  body();
}

template <class Body>
void with_widest_vectors(const Body& body) {
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512) return run_avx512(body);
  if (has_avx2) return run_avx2(body);
  body();
}

#else

template <class Body>
void with_widest_vectors(const Body& body) {
  body();
}

#endif

}  // namespace whipstaff
