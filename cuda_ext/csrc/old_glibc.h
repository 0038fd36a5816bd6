// Included before everything else in every source (setup.py): what is compiled beside a newer glibc runs with 2.28, which
// is what vLLM's and torch's wheels ask for (manylinux_2_28).
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__)
// glibc 2.29 has a further version of log, which differs in how it reports errors to errno.
__asm__(".symver log,log@GLIBC_2.2.5");
// libstdc++ asks this variable of glibc 2.32 whether reference counts may be changed without locked instructions. This
// one says no, and stays inside.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
