/*
 * Do the vector registers survive? Fills every YMM register, with AVX-512 every ZMM and mask register,
 * with a pattern of its own, spins long enough for timer interrupts, gives the processor up, spins
 * again, and compares all bytes. Linked into the guest's /init; with STANDALONE a program of its own
 * for the emulated PC, so that host and guests use the registers against each other:
 *
 *   vectors SEED ROUNDS     0: all survived; 1: one did not, named on stdout; 2: no AVX
 */
#include "vectors.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifdef __x86_64__

/* Two loops of this many turns, two instructions each: on the emulated PC some ticks of its host. */
#define SPINS 250000

struct bank {
	uint8_t vector[32][64];
	uint64_t mask[8];
};

static void fill(struct bank *bank, uint64_t seed)
{
	uint8_t *bytes = (uint8_t *)bank;
	uint64_t state = seed * 0x9e3779b97f4a7c15ULL + 1;
	size_t i;

	for (i = 0; i < sizeof(*bank); i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		bytes[i] = (uint8_t)(state >> 32);
	}
}

/* For a test of this program: a register that does not survive. */
#ifdef SPOIL
#define LOSE "vpxor %%xmm9, %%xmm9, %%xmm9\n"
#else
#define LOSE ""
#endif

/* sched_yield: system call 24. RCX and R11 are lost to the instruction. */
#define WAIT                               \
	"movl %[spins], %%ecx\n"           \
	"1: subl $1, %%ecx\n jnz 1b\n"     \
	"movl $24, %%eax\n syscall\n" LOSE \
	"movl %[spins], %%ecx\n"           \
	"1: subl $1, %%ecx\n jnz 1b\n"

#define LOW(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) \
	M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
#define HIGH(M) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23) \
	M(24) M(25) M(26) M(27) M(28) M(29) M(30) M(31)
#define MASKS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)

#define LOAD_Y(n) "vmovdqu " #n "*64(%[in]), %%ymm" #n "\n"
#define SAVE_Y(n) "vmovdqu %%ymm" #n ", " #n "*64(%[out])\n"
#define LOAD_Z(n) "vmovdqu64 " #n "*64(%[in]), %%zmm" #n "\n"
#define SAVE_Z(n) "vmovdqu64 %%zmm" #n ", " #n "*64(%[out])\n"
#define LOAD_K(n) "kmovw 2048+" #n "*8(%[in]), %%k" #n "\n"
#define SAVE_K(n) "kmovw %%k" #n ", 2048+" #n "*8(%[out])\n"

#define LOST "rax", "rcx", "r11", "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", \
	"xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

static void hold_avx(const struct bank *in, struct bank *out)
{
	__asm__ volatile(LOW(LOAD_Y) WAIT LOW(SAVE_Y) "vzeroupper\n"
			 :
			 : [in] "r"(in), [out] "r"(out), [spins] "i"(SPINS)
			 : LOST);
}

/* The compiler, told of no AVX-512, uses none of the registers that are not in LOST. */
static void hold_avx512(const struct bank *in, struct bank *out)
{
	__asm__ volatile(LOW(LOAD_Z) HIGH(LOAD_Z) MASKS(LOAD_K) WAIT LOW(SAVE_Z) HIGH(SAVE_Z)
				 MASKS(SAVE_K) "vzeroupper\n"
			 :
			 : [in] "r"(in), [out] "r"(out), [spins] "i"(SPINS)
			 : LOST);
}

const char *vectors_offered(void)
{
	__builtin_cpu_init();
	if (__builtin_cpu_supports("avx512f"))
		return "AVX-512";
	return __builtin_cpu_supports("avx") ? "AVX" : "none";
}

const char *vectors_hold(unsigned seed, unsigned rounds)
{
	static char message[80];
	int wide = !strcmp(vectors_offered(), "AVX-512");
	struct bank in, out;
	unsigned round, i, bytes = wide ? 64 : 32;

	for (round = 0; round < rounds; round++) {
		fill(&in, ((uint64_t)seed << 32) + round);
		memset(&out, 0, sizeof(out));
		if (wide)
			hold_avx512(&in, &out);
		else
			hold_avx(&in, &out);
		for (i = 0; i < (wide ? 32u : 16u); i++)
			if (memcmp(in.vector[i], out.vector[i], bytes)) {
				snprintf(message, sizeof(message), "%cMM%u changed in round %u",
					 wide ? 'Z' : 'Y', i, round);
				return message;
			}
		for (i = 0; wide && i < 8; i++)
			if (((in.mask[i] ^ out.mask[i]) & 0xffff) != 0) {
				snprintf(message, sizeof(message), "k%u changed in round %u", i,
					 round);
				return message;
			}
	}
	return NULL;
}

#else

const char *vectors_offered(void)
{
	return "none";
}

const char *vectors_hold(unsigned seed, unsigned rounds)
{
	(void)seed;
	(void)rounds;
	return "no 64-bit program";
}

#endif

#ifdef STANDALONE
#include <stdlib.h>

int main(int argc, char **argv)
{
	const char *lost;

	if (argc != 3 || !strcmp(vectors_offered(), "none"))
		return 2;
	lost = vectors_hold((unsigned)atoi(argv[1]), (unsigned)atoi(argv[2]));
	if (lost)
		printf("vectors: %s\n", lost);
	return lost != NULL;
}
#endif
