// What nvcc and a GPU give the kernels, given by g++ and one thread of a CPU: CUDA's words, and its execution model. The
// blocks of a launch run one after another; the threads of a block are fibers, which run until they meet a barrier of
// their block or warp. What it shows: wrong indices and missing barriers, since threads and blocks take their turns in
// ever other orders and shared memory begins as NaN; barriers that not all threads reach, as an error. With sanitizers
// also what is read or written beyond its bounds, and wide loads that are not aligned. What it cannot show: the order in
// which warps see memory, what a GPU's own exp and log round to, graphs, and time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace whipstaff::cuda_on_cpu {

constexpr int LANES = 32;
constexpr unsigned FULL_WARP = 0xffffffff;
constexpr size_t STACK_SIZE = 64 * 1024;
constexpr size_t ALWAYS_SHARED = 48 * 1024;  // bytes of shared memory that a block has unasked
constexpr size_t MAX_SHARED = 227 * 1024;    // and those of sm_90 when asked

// 0 to size - 1, each once: onwards or backwards from somewhere, differently every time, the same in every run.
class Order {
 public:
  explicit Order(unsigned size) : size(size) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    first = (state >> 8) % size;
    step = state >> 31 ? 1 : size - 1;
  }
  unsigned operator[](unsigned i) const { return (first + uint64_t(i) * step) % size; }

 private:
  unsigned size, first, step;
};

// A stack and the place in the code where what runs there goes on.
class Fiber {
 public:
  enum class State { Ready, AtBlock, AtWarp, Done };
  State state = State::Ready;
  const char* site = "";     // of the barrier that it waits at
  uint64_t shown[2] = {};    // what this lane shows its warp at every other exchange
  unsigned num_exchanges = 0;

  explicit Fiber(void (*entry)()) {
    getcontext(&start);
    start.uc_stack = {.ss_sp = stack.get(), .ss_flags = 0, .ss_size = STACK_SIZE};
    start.uc_link = nullptr;
    makecontext(&start, entry, 0);
  }

  // Called from the launch: goes on with this fiber until it waits.
  void resume() {
    leave(&home_shadow, stack.get(), STACK_SIZE);
    if (_setjmp(home) == 0) {
      if (!is_started) {
        is_started = true;
        setcontext(&start);
      }
      _longjmp(here, 1);
    }
    arrive(home_shadow);
  }

  // Called from the fiber: back to the launch.
  void wait(State as, const char* at) {
    state = as;
    site = at;
    leave(&shadow, home_stack, home_size);
    if (_setjmp(here) == 0) _longjmp(home, 1);
    arrived();
  }

  void arrived() { arrive(shadow, &home_stack, &home_size); }

 private:
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(STACK_SIZE);
  ucontext_t start;
  bool is_started = false;
  jmp_buf here;
  void* shadow = nullptr;
  static inline jmp_buf home;
  static inline void* home_shadow = nullptr;
  static inline const void* home_stack = nullptr;
  static inline size_t home_size = 0;

  // The address sanitizer is told which stack is in use.
#ifdef __SANITIZE_ADDRESS__
  static void leave(void** kept, const void* to, size_t size) { __sanitizer_start_switch_fiber(kept, to, size); }
  static void arrive(void* kept, const void** from = nullptr, size_t* size = nullptr) {
    __sanitizer_finish_switch_fiber(kept, from, size);
  }
#else
  static void leave(void**, const void*, size_t) {}
  static void arrive(void*, const void** = nullptr, size_t* = nullptr) {}
#endif
};

// The launch that is running.
struct Machine {
  dim3 thread, block, num_threads, num_blocks;
  std::function<void()> kernel;
  std::deque<Fiber> fibers;  // of a block's threads; they serve all blocks and launches
  unsigned current = 0;
  std::unique_ptr<float[]> shared;
};
inline Machine machine;

inline Fiber& me() { return machine.fibers[machine.current]; }

inline void run_threads() {
  me().arrived();
  while (true) {
    machine.kernel();
    me().wait(Fiber::State::Done, "its end");
  }
}

// The threads [begin, end) of the block go on if all of them, or all that have not ended, wait at the same barrier.
inline bool release(unsigned begin, unsigned end, Fiber::State waiting) {
  const char* site = nullptr;
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state == Fiber::State::Done && waiting == Fiber::State::AtBlock) continue;
    if (fiber.state != waiting || (site && std::strcmp(site, fiber.site) != 0)) return false;
    site = fiber.site;
  }
  for (unsigned i = begin; i < end; ++i)
    if (machine.fibers[i].state == waiting) machine.fibers[i].state = Fiber::State::Ready;
  return site != nullptr;
}

[[noreturn]] inline void refuse_divergence() {
  std::string text = "not all threads of a block come to its barrier:";
  for (unsigned i = 0; i < machine.fibers.size(); ++i)
    if (i == 0 || std::strcmp(machine.fibers[i].site, machine.fibers[i - 1].site) != 0)
      text += " from thread " + std::to_string(i) + " on at " + machine.fibers[i].site + ";";
  machine.fibers.clear();  // what waits there is given up
  throw std::runtime_error(text);
}

inline void run_block() {
  const unsigned num = machine.num_threads.x;
  for (Fiber& fiber : machine.fibers) fiber.state = Fiber::State::Ready;
  while (true) {
    const Order order(num);
    for (unsigned i = 0; i < num; ++i) {
      machine.current = machine.thread.x = order[i];
      if (me().state == Fiber::State::Ready) me().resume();
    }
    const auto is_done = [](const Fiber& fiber) { return fiber.state == Fiber::State::Done; };
    if (std::all_of(machine.fibers.begin(), machine.fibers.end(), is_done)) return;
    bool goes_on = false;
    for (unsigned warp = 0; warp < num; warp += LANES)
      goes_on |= release(warp, std::min(num, warp + LANES), Fiber::State::AtWarp);
    if (!goes_on && !release(0, num, Fiber::State::AtBlock)) refuse_divergence();
  }
}

inline void launch(dim3 blocks, unsigned threads, size_t shared_bytes, std::function<void()> kernel) {
  machine.num_blocks = blocks;
  machine.num_threads = threads;
  machine.kernel = std::move(kernel);
  const size_t num_shared = (shared_bytes + sizeof(float) - 1) / sizeof(float);
  machine.shared = std::make_unique<float[]>(num_shared);
  while (machine.fibers.size() > threads) machine.fibers.pop_back();
  while (machine.fibers.size() < threads) machine.fibers.emplace_back(run_threads);
  const Order order(blocks.x * blocks.y * blocks.z);
  for (unsigned i = 0; i < blocks.x * blocks.y * blocks.z; ++i) {
    const unsigned block = order[i];
    machine.block = dim3(block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y);
    std::fill_n(machine.shared.get(), num_shared, NAN);
    run_block();
  }
}

// By kernel: the shared memory that its blocks may have since it was asked for, in bytes.
inline std::map<void*, size_t>& asked_shared() {
  static std::map<void*, size_t> bytes;
  return bytes;
}

inline void check_shared(void* kernel, size_t bytes) {
  const auto asked = asked_shared().find(kernel);
  const size_t most = asked == asked_shared().end() ? ALWAYS_SHARED : asked->second;
  if (bytes > std::min(most, MAX_SHARED))
    throw std::runtime_error("a block may have " + std::to_string(most) + " bytes of shared memory, the launch has " +
                             std::to_string(bytes));
}

inline float* dynamic_shared() { return machine.shared.get(); }

// What `lane_of(lane)` showed, for every lane of a warp. No lane is two exchanges ahead of another: two places do.
template <unsigned mask, class T, class LaneOf>
T exchange(T value, const LaneOf& lane_of, const char* site) {
  static_assert(mask == FULL_WARP && sizeof(T) <= sizeof(uint64_t));
  const unsigned place = me().num_exchanges++ % 2, lane = machine.current % LANES, warp = machine.current - lane;
  std::memcpy(&me().shown[place], &value, sizeof(T));
  me().wait(Fiber::State::AtWarp, site);
  T seen;
  std::memcpy(&seen, &machine.fibers[warp + lane_of(lane)].shown[place], sizeof(T));
  return seen;
}

template <unsigned mask, class T>
T reduce_add(T value, const char* site) {
  for (unsigned distance = LANES / 2; distance > 0; distance /= 2)
    value += exchange<mask>(value, [=](unsigned lane) { return lane ^ distance; }, site);
  return value;
}

}  // namespace whipstaff::cuda_on_cpu

#define WHIPSTAFF_TEXT_OF(line) #line
#define WHIPSTAFF_SITE_AT(line) __FILE__ ":" WHIPSTAFF_TEXT_OF(line)
#define WHIPSTAFF_SITE WHIPSTAFF_SITE_AT(__LINE__)

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define threadIdx whipstaff::cuda_on_cpu::machine.thread
#define blockIdx whipstaff::cuda_on_cpu::machine.block
#define blockDim whipstaff::cuda_on_cpu::machine.num_threads
#define gridDim whipstaff::cuda_on_cpu::machine.num_blocks
#define __syncthreads() whipstaff::cuda_on_cpu::me().wait(whipstaff::cuda_on_cpu::Fiber::State::AtBlock, WHIPSTAFF_SITE)
#define __shfl_xor_sync(mask, value, distance) \
  whipstaff::cuda_on_cpu::exchange<mask>(value, [=](unsigned lane) { return lane ^ (distance); }, WHIPSTAFF_SITE)
#define __reduce_add_sync(mask, value) whipstaff::cuda_on_cpu::reduce_add<mask>(value, WHIPSTAFF_SITE)

template <class T>
T atomicAdd(T* at, T by) {
  return std::exchange(*at, *at + by);
}

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
