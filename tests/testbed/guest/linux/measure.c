/*
 * /init of the Linux guest that measures one interprocessor interrupt: a page of a program that runs on two processors is
 * made read-only, and the kernel tells the other processor to forget it. The call returns when that one has
 * answered, so it is a round trip. The same with the other processor asleep, which the kernel leaves alone, is what
 * the call costs without.
 *
 * Lines it writes, ticks of the time-stamp counter:
 *   @@ROW ipi MEDIAN MEAN LEAST COUNT
 *   @@ROW ipi_none MEDIAN MEAN LEAST COUNT
 *   GUEST: PASS
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define ROUNDS 128
#define WARM 16

static volatile char *page;
static int spinning;
/* Aligned for the stack of a process. */
static char stack[16384] __attribute__((aligned(16)));

static void end(const char *verdict)
{
	struct timespec drain = { 0, 20 * 1000 * 1000 };

	printf("GUEST: %s\n", verdict);
	fflush(stdout);
	tcdrain(1);
	nanosleep(&drain, NULL);
	if (getpid() == 1)
		reboot(RB_AUTOBOOT);
	exit(2);
}

static void go_to(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		end("FAIL ipi: there is no second processor");
}

/* A process with our memory: the kernel is built without what threads need. It ends with the machine. */
static int spin(void *nothing)
{
	(void)nothing;
	go_to(1);
	__atomic_store_n(&spinning, 1, __ATOMIC_SEQ_CST);
	for (;;)
		__asm__ volatile("");
	return 0;
}

static int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void measure(const char *name)
{
	static uint64_t ticks[ROUNDS];
	uint64_t start, sum = 0;
	int round;

	for (round = -WARM; round < ROUNDS; round++) {
		if (mprotect((void *)page, 4096, PROT_READ | PROT_WRITE))
			end("FAIL ipi: mprotect");
		*page = 1;
		start = __rdtsc();
		if (mprotect((void *)page, 4096, PROT_READ))
			end("FAIL ipi: mprotect");
		if (round >= 0)
			ticks[round] = __rdtsc() - start;
	}
	for (round = 0; round < ROUNDS; round++)
		sum += ticks[round];
	qsort(ticks, ROUNDS, sizeof(ticks[0]), by_size);
	printf("@@ROW %s %llu %llu %llu %d\n", name, (unsigned long long)ticks[ROUNDS / 2],
	       (unsigned long long)(sum / ROUNDS), (unsigned long long)ticks[0], ROUNDS);
	fflush(stdout);
}

int main(void)
{
	if (getpid() != 1) {
		fprintf(stderr, "this is /init of a virtual machine: it reboots the machine\n");
		return 2;
	}
	go_to(0);
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		end("FAIL ipi: no memory");
	measure("ipi_none");
	if (clone(spin, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL) < 0)
		end("FAIL ipi: no second process");
	while (!__atomic_load_n(&spinning, __ATOMIC_SEQ_CST))
		sched_yield();
	measure("ipi");
	end("PASS");
	return 0;
}
