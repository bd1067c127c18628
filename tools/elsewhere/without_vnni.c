/* Hide AVX-512 and VNNI from the programs that this library is preloaded into, so that they run the code paths of an AVX2 machine.
 *
 * Linux can make the CPUID instruction fault (arch_prctl ARCH_CPUID, flag cpuid_fault in /proc/cpuinfo). The handler executes it for
 * the program and clears the feature bits: leaf 7 EBX's AVX512 bits, ECX's and EDX's, and leaf 7.1 EAX's AVX-VNNI and AVX-IFMA.
 *
 *   cc -shared -fPIC -O2 -o without_vnni.so without_vnni.c && LD_PRELOAD=./without_vnni.so python …
 *
 * Where it cannot (AMD, virtual machines), compile with -DPATCHED and run the copy of onnxruntime that without_vnni.py makes: its CPUID
 * instructions are UD2, which faults everywhere.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_CPUID 0x1012
#ifdef PATCHED
#define SIGNAL SIGILL
#define SECOND_BYTE 0x0b
#else
#define SIGNAL SIGSEGV
#define SECOND_BYTE 0xa2
#endif
#define AVX512_EBX ((1u << 16) | (1u << 17) | (1u << 21) | (1u << 26) | (1u << 27) | (1u << 28) | (1u << 30) | (1u << 31))
#define AVX512_ECX ((1u << 1) | (1u << 6) | (1u << 11) | (1u << 12) | (1u << 14))
#define AVX512_AMX_EDX ((1u << 2) | (1u << 3) | (1u << 8) | (1u << 22) | (1u << 23) | (1u << 24) | (1u << 25))
#define AVX_VNNI_EAX ((1u << 4) | (1u << 5) | (1u << 21) | (1u << 23))
#define AVX_VNNI_INT_EDX ((1u << 4) | (1u << 5) | (1u << 10) | (1u << 19))

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    (void)info;
    if (code[0] != 0x0f || code[1] != SECOND_BYTE) { /* a fault of another kind: die of it */
        signal(number, SIG_DFL);
        return;
    }
    unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX], a, b, c, d;
#ifndef PATCHED
    syscall(SYS_arch_prctl, ARCH_CPUID, 1);
#endif
    __cpuid_count(leaf, subleaf, a, b, c, d);
#ifndef PATCHED
    syscall(SYS_arch_prctl, ARCH_CPUID, 0);
#endif
    if (leaf == 7 && subleaf == 0) {
        b &= ~AVX512_EBX;
        c &= ~AVX512_ECX;
        d &= ~AVX512_AMX_EDX;
    } else if (leaf == 7 && subleaf == 1) {
        a &= ~AVX_VNNI_EAX;
        d &= ~AVX_VNNI_INT_EDX;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGNAL, &action, NULL);
#ifndef PATCHED
    if (syscall(SYS_arch_prctl, ARCH_CPUID, 0)) {
        fprintf(stderr, "this machine cannot make CPUID fault: compile with -DPATCHED and run what without_vnni.py makes\n");
        exit(3);
    }
#endif
}
