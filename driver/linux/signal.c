// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * Signals that a thread in RUN blocks.
 *
 * A client's threads tell a vCPU's thread of interrupts by a signal. QEMU blocks
 * it, so the kernel neither wakes nor interrupts that thread, and the guest would
 * go on to the next tick. A tracepoint tells of every signal that is sent, those
 * that are blocked, or pending already, included; the guest's processor is then
 * interrupted, and RUN returns INTERRUPT. The signal stays where it is: whoever
 * blocked it may want it.
 *
 * If the sender is a vCPU's thread itself, as for an interprocessor interrupt, the
 * receiver hears of it when the sender calls RUN again. By then QEMU has given up
 * its one lock, and the receiver need not sleep for it: that would cost more. A
 * thread that has been out of its guest for a tick may not be back soon, or may be
 * another one at the same address.
 *
 * One that is sent while the thread is in RUN and not in the guest, on its way there or
 * after a page, is counted. RUN compares the count with that of its beginning when
 * signals interrupt the guest from then on (haxm_os_guest_begin).
 */

#include <linux/atomic.h>
#include <linux/jiffies.h>
#include <linux/percpu.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/signal.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/tracepoint.h>
#include <trace/events/ipi.h>
#include <trace/events/signal.h>

#include "haxm.h"

DEFINE_PER_CPU(struct haxm_guest, haxm_guest);

/* Interrupts are off. */
void haxm_signal_owed(void)
{
	struct haxm_guest *here = this_cpu_ptr(&haxm_guest);

	while (here->owed)
		smp_send_reschedule(here->cpus[--here->owed]);
}

atomic_t haxm_sent[1 << HAXM_PLACES_LOG];

#ifdef CONFIG_TRACEPOINTS
static struct tracepoint *haxm_signals;

/*
 * The receiver's sighand->siglock is held, so what it blocks stays the same, and
 * interrupts are off. With PREEMPT_RT they are on, as that lock sleeps, and since 7.0
 * tracepoints leave preemption on too; but no interrupt sends a signal there.
 */
static void haxm_signal(void *data, int number, struct kernel_siginfo *info,
			struct task_struct *task, int group, int result)
{
	struct haxm_guest *here;
	unsigned int cpu;

	if (group || !sigismember(&task->blocked, number))
		return;
	atomic_inc(haxm_sent_to(task));
	/* See haxm_os_guest_begin(). */
	smp_mb__after_atomic();
	cpu = task_cpu(task);
	if (READ_ONCE(per_cpu(haxm_guest.task, cpu)) != (unsigned long)task)
		return;
	preempt_disable();
	here = this_cpu_ptr(&haxm_guest);
	if (here->task == ((unsigned long)current | HAXM_OUTSIDE) &&
	    time_before_eq(jiffies, here->left + 1) &&
	    here->owed < ARRAY_SIZE(here->cpus))
		here->cpus[here->owed++] = cpu;
	else
		smp_send_reschedule(cpu);
	preempt_enable();
}

static void haxm_look_for_signals(struct tracepoint *point, void *data)
{
	if (!strcmp(point->name, "signal_generate"))
		haxm_signals = point;
}

/* Without it nothing is lost but time. */
void haxm_signal_init(void)
{
	check_trace_callback_type_signal_generate(haxm_signal);
	for_each_kernel_tracepoint(haxm_look_for_signals, NULL);
	if (haxm_signals && tracepoint_probe_register(haxm_signals, haxm_signal, NULL))
		haxm_signals = NULL;
}

void haxm_signal_exit(void)
{
	if (!haxm_signals)
		return;
	tracepoint_probe_unregister(haxm_signals, haxm_signal, NULL);
	/* No call of it is under way any more. */
	tracepoint_synchronize_unregister();
}

u32 haxm_os_hears_signals(void)
{
	return haxm_signals != NULL;
}
#else
void haxm_signal_init(void)
{
}

void haxm_signal_exit(void)
{
}

u32 haxm_os_hears_signals(void)
{
	return 0;
}
#endif

u32 haxm_os_signals_sent(void)
{
	return atomic_read(haxm_sent_to(current));
}
