/*
 * /init of the Linux guest that runs inside the virtual machine: does a little of everything a
 * program does, checks each result, prints a verdict and ends the machine.
 *
 * Lines it writes (the test bed reads the last one):
 *   guest: STEP ...     one per step that passed
 *   GUEST: PASS         all of them passed
 *   GUEST: FAIL STEP: what
 *
 * The kernel's command line says what to expect; it reaches this program as its environment:
 *   guest_cpus=N        processors that must be online (default 1)
 *   guest_vectors=SEED  hold patterns in the AVX registers for a while, with other guests
 *   guest_clock=SECONDS after that time the time-stamp counter must still be the clock
 *
 * Last it reads the kernel's log: a complaint of the kernel is a failure, and lines of the level
 * "warning" and above are printed.
 *
 * The machine ends by a reboot: with reboot=t that is a triple fault.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "../vectors.h"

#define CHILDREN 4
#define PAGE 4096

/* The same work done by init itself and by every child, so that results can be compared. */
struct work {
	uint64_t hash;
	double series;
	float lanes[4];
};

/* Written by children, read by init. */
static volatile struct shared {
	unsigned started;
	struct work done[CHILDREN];
	unsigned cpu[CHILDREN];
} *shared;

static void end(void)
{
	struct timespec drain = { 0, 20 * 1000 * 1000 };

	if (getpid() != 1)
		_exit(2);
	tcdrain(1);
	nanosleep(&drain, NULL);
	sync();
	reboot(RB_AUTOBOOT);
	for (;;)
		pause();
}

static void fail(const char *step, const char *format, ...)
	__attribute__((noreturn, format(printf, 2, 3)));

static void fail(const char *step, const char *format, ...)
{
	va_list args;

	printf("GUEST: FAIL %s: ", step);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	printf("\n");
	fflush(stdout);
	if (getpid() != 1)
		_exit(1);
	end();
	__builtin_unreachable();
}

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* Integers, doubles (the sum of 1/k^2) and four floats in an SSE register that stays live over
 * the whole loop, so that a lost or mixed-up register shows. */
static struct work work(unsigned rounds)
{
	typedef float vector __attribute__((vector_size(16)));
	vector lanes = { 1, 2, 3, 4 }, step = { 0.5f, 0.25f, 0.125f, 0.0625f };
	struct work w = { .hash = 0xcbf29ce484222325ULL, .series = 0 };
	unsigned k;

	for (k = 1; k <= rounds; k++) {
		w.hash = (w.hash ^ (k & 0xff)) * 0x100000001b3ULL;
		w.series += 1.0 / ((double)k * k);
		lanes = lanes * step + step;
	}
	memcpy(w.lanes, &lanes, sizeof(lanes));
	return w;
}

static int same(const volatile struct work *a, const struct work *b)
{
	int i;

	for (i = 0; i < 4; i++)
		if (a->lanes[i] != b->lanes[i])
			return 0;
	return a->hash == b->hash && a->series == b->series;
}

static void check_sums(void)
{
	uint64_t sum = 0, i;

	for (i = 1; i <= 100000; i++) {
		sum += i * i;
		__asm__ volatile("" : "+r"(sum));
	}
	if (sum != 333338333350000ULL)
		fail("sums", "got %llu", (unsigned long long)sum);
	printf("guest: sums of 100000 squares\n");
}

static void check_float(void)
{
	volatile double two = 2.0;
	volatile long double third = 1.0L / 3.0L;
	/* x -> x/2 + 1/2 and so on: after 64 rounds each lane is at its fixed point. */
	static const float fixed[4] = { 1.0f, 1.0f / 3, 1.0f / 7, 1.0f / 15 };
	struct work w = work(1000);
	int i;

	if (w.hash != 0x5c761ee45dd99ccdULL)
		fail("float", "hash is %llx", (unsigned long long)w.hash);
	if (fabs(w.series - 1.6439345666815615) > 1e-12)
		fail("float", "series is %.17g", w.series);
	for (i = 0; i < 4; i++)
		if (fabsf(w.lanes[i] - fixed[i]) > 4 * FLT_EPSILON)
			fail("float", "lane %d is %.9g", i, (double)w.lanes[i]);
	if (sqrt(two) * sqrt(two) != 2.0000000000000004)
		fail("float", "square root");
	if (third * 3.0L != 1.0L || (double)third != 1.0 / 3.0)
		fail("float", "x87 division");
	printf("guest: float, SSE and x87 arithmetic\n");
}

/* Faults that the processor raises and the kernel turns into signals. */
static sigjmp_buf *back;
static volatile void *fault_address;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)context;
	fault_address = info->si_addr;
	siglongjmp(*back, number);
}

/* Runs in a child: for init itself the kernel logs every such signal. */
static void raise_faults(void)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
	volatile char *page;
	sigjmp_buf here;
	int got;

	back = &here;
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGILL, &action, NULL);
	sigaction(SIGFPE, &action, NULL);

	page = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	got = sigsetjmp(here, 1);
	if (!got) {
		page[5] = 1;
		fail("faults", "a read-only page was written");
	}
	if (got != SIGSEGV || fault_address != page + 5)
		fail("faults", "signal %d, not a page fault at the page", got);
	got = sigsetjmp(here, 1);
	if (!got)
		__asm__ volatile("ud2");
	if (got != SIGILL)
		fail("faults", "signal %d after ud2", got);
	got = sigsetjmp(here, 1);
	if (!got)
		__asm__ volatile("divl %0" : : "r"(0), "a"(1), "d"(0) : "cc");
	if (got != SIGFPE)
		fail("faults", "signal %d after a division by zero", got);
}

static void check_faults(void)
{
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		raise_faults();
		_exit(0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0)
		fail("faults", "the child that raises them did not end well");
	printf("guest: page, opcode and division faults\n");
}

static void check_file(void)
{
	static char out[3 * PAGE + 7], in[sizeof(out) + 1];
	size_t i;
	int fd;

	mkdir("/data", 0755);
	if (mount("none", "/data", "tmpfs", 0, NULL))
		fail("file", "no tmpfs");
	for (i = 0; i < sizeof(out); i++)
		out[i] = (char)(i * 7 + (i >> 8));
	fd = open("/data/file", O_RDWR | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || write(fd, out, sizeof(out)) != (ssize_t)sizeof(out))
		fail("file", "cannot write");
	close(fd);
	fd = open("/data/file", O_RDONLY);
	if (read(fd, in, sizeof(in)) != (ssize_t)sizeof(out) || memcmp(in, out, sizeof(out)))
		fail("file", "read other bytes than were written");
	close(fd);
	printf("guest: file of %zu bytes written and read\n", sizeof(out));
}

static void check_sleep(void)
{
	struct timespec wait = { 0, 50 * 1000 * 1000 };
	uint64_t before = now_us(), slept;

	if (nanosleep(&wait, NULL))
		fail("sleep", "interrupted");
	slept = now_us() - before;
	/* The upper bound is loose: the emulated host may be slow. */
	if (slept < 50000 || slept > 20 * 1000000)
		fail("sleep", "50 ms took %llu us", (unsigned long long)slept);
	printf("guest: sleep\n");
}

static unsigned current_cpu(void)
{
	unsigned cpu = 0;

	if (getcpu(&cpu, NULL))
		fail("cpus", "getcpu");
	return cpu;
}

/* One child: goes to its processor, waits until all have started, works, and tells. */
static void child(unsigned index, unsigned cpu, int pipe_end)
{
	uint64_t limit = now_us() + 60 * 1000000ULL;
	char mark = (char)('a' + index);
	struct work w;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		fail("children", "cannot go to processor %u", cpu);
	__atomic_fetch_add(&shared->started, 1, __ATOMIC_SEQ_CST);
	/* With several processors the children spin at the same time. */
	while (__atomic_load_n(&shared->started, __ATOMIC_SEQ_CST) < CHILDREN) {
		if (now_us() > limit)
			_exit(3);
		sched_yield();
	}
	w = work(20000);
	memcpy((void *)&shared->done[index], &w, sizeof(w));
	shared->cpu[index] = current_cpu();
	if (write(pipe_end, &mark, 1) != 1)
		_exit(2);
	_exit(40 + (int)index);
}

static void check_children(unsigned cpus)
{
	pid_t pids[CHILDREN];
	struct work expected;
	char marks[CHILDREN];
	int ends[2], status;
	unsigned i, seen = 0;

	shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED || pipe(ends))
		fail("children", "no shared memory or pipe");
	fflush(stdout);
	for (i = 0; i < CHILDREN; i++) {
		pids[i] = fork();
		if (pids[i] < 0)
			fail("children", "fork");
		if (pids[i] == 0)
			child(i, i % cpus, ends[1]);
	}
	expected = work(20000);
	for (i = 0; i < CHILDREN; i++) {
		if (waitpid(pids[i], &status, 0) != pids[i] || !WIFEXITED(status) ||
		    WEXITSTATUS(status) != 40 + (int)i)
			fail("children", "child %u ended with %#x", i, status);
		if (!same(&shared->done[i], &expected))
			fail("children", "child %u got another result", i);
		if (shared->cpu[i] != i % cpus)
			fail("children", "child %u ran on processor %u", i, shared->cpu[i]);
	}
	for (i = 0; i < CHILDREN; i++) {
		if (read(ends[0], &marks[i], 1) != 1 || marks[i] < 'a' ||
		    marks[i] >= 'a' + CHILDREN)
			fail("children", "pipe");
		seen |= 1u << (marks[i] - 'a');
	}
	if (seen != (1u << CHILDREN) - 1)
		fail("children", "the pipe lost a child");
	printf("guest: %d children forked, run and waited for\n", CHILDREN);
}

/* Every processor is online, can be gone to, and tells the time in step with the others. */
static void check_cpus(unsigned expected)
{
	uint64_t last = 0, time;
	cpu_set_t set, all;
	unsigned cpu, round;

	if (sched_getaffinity(0, sizeof(all), &all))
		fail("cpus", "sched_getaffinity");
	if ((unsigned)CPU_COUNT(&all) != expected)
		fail("cpus", "%d online, not %u", CPU_COUNT(&all), expected);
	for (round = 0; round < 4; round++) {
		for (cpu = 0; cpu < expected; cpu++) {
			CPU_ZERO(&set);
			CPU_SET(cpu, &set);
			if (sched_setaffinity(0, sizeof(set), &set) || current_cpu() != cpu)
				fail("cpus", "cannot go to processor %u", cpu);
			time = now_us();
			if (time < last)
				fail("cpus", "time went back on processor %u", cpu);
			last = time;
		}
	}
	sched_setaffinity(0, sizeof(all), &all);
	printf("guest: %u processor%s\n", expected, expected == 1 ? "" : "s");
}

/* Two processes hold patterns of their own, so that the guest's kernel switches the registers too. */
static void check_vectors(unsigned seed)
{
	const char *lost;
	pid_t pids[2];
	int status, i;

	if (!strcmp(vectors_offered(), "none"))
		fail("vectors", "no AVX");
	printf("guest: vectors begin, %s\n", vectors_offered());
	fflush(stdout);
	for (i = 0; i < 2; i++) {
		pids[i] = fork();
		if (pids[i] == 0) {
			lost = vectors_hold(seed + (unsigned)i, 24);
			if (lost)
				fail("vectors", "%s", lost);
			_exit(0);
		}
	}
	for (i = 0; i < 2; i++)
		if (pids[i] < 0 || waitpid(pids[i], &status, 0) != pids[i] || status != 0)
			fail("vectors", "process %d", i);
	printf("guest: vectors end\n");
}

static void read_line(const char *path, char *line, size_t size)
{
	ssize_t got = -1;
	int fd = open(path, O_RDONLY);

	if (fd >= 0)
		got = read(fd, line, size - 1);
	if (got < 0)
		fail("clock", "cannot read %s", path);
	line[got] = '\0';
	line[strcspn(line, "\n")] = '\0';
	close(fd);
}

/* The kernel looks at its clocks each half second. */
static void check_clock(unsigned seconds)
{
	const char *folder = "/sys/devices/system/clocksource/clocksource0";
	char path[128], clock[32];

	mkdir("/sys", 0755);
	if (mount("none", "/sys", "sysfs", 0, NULL))
		fail("clock", "no sysfs");
	sleep(seconds);
	snprintf(path, sizeof(path), "%s/current_clocksource", folder);
	read_line(path, clock, sizeof(clock));
	if (strcmp(clock, "tsc"))
		fail("clock", "after %u s it is %s", seconds, clock);
	printf("guest: after %u s the clock is tsc\n", seconds);
}

/* What a kernel writes that has found something wrong with its machine or itself. */
static const char *const complaints[] = {
	"WARNING:",
	"BUG:",
	"Call Trace",
	"unchecked MSR access",
	"general protection",
	"nobody cared",
	"APIC error",
	"soft lockup",
	"detected stall",
	"TSC ADJUST",
	"TSC warp",
	"unstable",
	"timekeeping watchdog",
	"failed to come online",
	"Not responding",
};

static void check_log(void)
{
	static char log[1 << 20];
	unsigned lines = 0, level, i;
	char *line, *next, *text;
	int length = klogctl(3, log, sizeof(log) - 1);

	if (length <= 0)
		fail("log", "cannot be read");
	log[length] = '\0';
	for (line = log; line && *line; line = next) {
		next = strchr(line, '\n');
		if (next)
			*next++ = '\0';
		lines++;
		/* <LEVEL>[SECONDS] TEXT; what continues a line has no time. */
		level = line[0] == '<' ? (unsigned)atoi(line + 1) & 7 : 7;
		text = line[0] == '<' ? line + 3 : line;
		if (text[0] == '[')
			text += strcspn(text, "]") + 2;
		if (level <= 4)
			printf("guest log: %s\n", text);
		for (i = 0; i < sizeof(complaints) / sizeof(complaints[0]); i++)
			if (strstr(text, complaints[i]))
				fail("log", "%s", text);
	}
	printf("guest: no complaint in %u lines of the log\n", lines);
}

static unsigned wanted(const char *name, unsigned otherwise)
{
	const char *value = getenv(name);

	return value ? (unsigned)atoi(value) : otherwise;
}

int main(void)
{
	unsigned cpus = wanted("guest_cpus", 1);
	unsigned seed = wanted("guest_vectors", 0), seconds = wanted("guest_clock", 0);

	if (getpid() != 1) {
		fprintf(stderr, "this is /init of a virtual machine: it reboots the machine\n");
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("guest: /init runs\n");
	check_cpus(cpus);
	check_sums();
	check_float();
	check_faults();
	check_file();
	check_sleep();
	check_children(cpus);
	if (seed)
		check_vectors(seed);
	if (seconds)
		check_clock(seconds);
	check_log();
	printf("GUEST: PASS\n");
	end();
	return 0;
}
