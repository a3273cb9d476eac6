/*
 * The first user program of a GNU Mach guest: no operating system's library, only the kernel's traps.
 * It prints through the kernel's debugging call, faults memory in, computes with the x87, waits for
 * the clock, gives the processor up, and prints a verdict. It never ends: who started the machine
 * ends it.
 *
 * Traps are numbered as in <mach/syscall_sw.h> of Debian's package gnumach-dev. A trap is a far call
 * through the call gate 7:0, its number in EAX, its arguments above a return address on the stack.
 */
typedef unsigned int word;

#define STUB(name, number)                                        \
	__asm__(".globl " #name "\n" #name ": movl $" #number ", %eax\n" \
		"lcall $7, $0\n ret\n")

STUB(mach_msg_trap, -25);
STUB(mach_reply_port, -26);
STUB(mach_task_self, -28);
STUB(mach_print, -30);
STUB(swtch, -60);
STUB(vm_allocate, -65);
STUB(vm_deallocate, -66);

int mach_msg_trap(void *message, word option, word send, word receive, word port, word ms,
		  word notify);
word mach_reply_port(void);
word mach_task_self(void);
void mach_print(const char *text);
int swtch(void);
int vm_allocate(word task, word *address, word size, int anywhere);
int vm_deallocate(word task, word address, word size);

#define RECEIVE 2
#define RECEIVE_TIMEOUT 0x100
#define TIMED_OUT 0x10004003

#define PAGE 4096u
#define SIZE (4u << 20)

static void stop(void)
{
	word port = mach_reply_port();
	word message[16];

	for (;;)
		mach_msg_trap(message, RECEIVE, 0, sizeof(message), port, 0, 0);
}

static void fail(const char *what)
{
	mach_print("GUEST: FAIL ");
	mach_print(what);
	mach_print("\n");
	stop();
}

/* The low half of a sum of squares, the same in every run. */
static word squares(word count)
{
	word sum = 0, i;

	for (i = 1; i <= count; i++) {
		sum += i * i;
		__asm__ volatile("" : "+r"(sum));
	}
	return sum;
}

/* Every page of new memory is zero, keeps what is written, and is the task's own again and again. */
static void check_memory(void)
{
	word task = mach_task_self(), round, at, address;

	for (round = 1; round <= 3; round++) {
		volatile word *page;

		if (vm_allocate(task, &address, SIZE, 1))
			fail("memory: vm_allocate");
		for (at = 0; at < SIZE; at += PAGE) {
			page = (volatile word *)(address + at);
			if (*page)
				fail("memory: a new page is not zero");
			*page = at ^ round;
			page[PAGE / sizeof(word) - 1] = ~at;
		}
		for (at = 0; at < SIZE; at += PAGE) {
			page = (volatile word *)(address + at);
			if (*page != (at ^ round) || page[PAGE / sizeof(word) - 1] != ~at)
				fail("memory: a page lost what was written");
		}
		if (vm_deallocate(task, address, SIZE))
			fail("memory: vm_deallocate");
	}
	mach_print("guest: 1024 pages faulted in, three times\n");
}

/* A value stays in an x87 register over traps and ticks. */
static void check_float(void)
{
	volatile long double third = 1.0L / 3.0L;
	long double kept = third;
	word round;

	for (round = 0; round < 200; round++) {
		kept = (kept + third) / 2;
		swtch();
	}
	if (kept != third || third * 3 != 1)
		fail("float: x87");
	if (squares(100000) != (word)333338333350000ULL)
		fail("sums");
	mach_print("guest: x87 and integer arithmetic\n");
}

/* Nothing comes on a new port: only the clock ends the wait. */
static void check_clock(void)
{
	word port = mach_reply_port(), message[16], round;

	for (round = 0; round < 5; round++)
		if (mach_msg_trap(message, RECEIVE | RECEIVE_TIMEOUT, 0, sizeof(message), port, 20,
				  0) != TIMED_OUT)
			fail("clock: a receive did not time out");
	mach_print("guest: five waits of 20 ms\n");
}

void _start(void)
{
	mach_print("guest: the first task runs\n");
	check_memory();
	check_float();
	check_clock();
	mach_print("GUEST: PASS\n");
	stop();
}
