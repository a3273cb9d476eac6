// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/* Processors: this one, others, and their coming and going. */

#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/perf_event.h>
#include <linux/reboot.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/smp.h>
#include <linux/syscore_ops.h>
#include <trace/events/ipi.h>
#include <asm/asm.h>
#include <asm/desc.h>
#include <asm/fpu/api.h>
#include <asm/processor-flags.h>
#include <asm/tlbflush.h>

#include "haxm.h"

u32 haxm_os_cpu_limit(void)
{
	return nr_cpu_ids;
}

u32 haxm_os_cpu_current(void)
{
	return raw_smp_processor_id();
}

void haxm_os_preempt_off(void)
{
	preempt_disable();
}

void haxm_os_preempt_on(void)
{
	preempt_enable();
}

size_t haxm_os_irq_save(void)
{
	unsigned long flags;

	local_irq_save(flags);
	return flags;
}

void haxm_os_irq_restore(size_t saved)
{
	local_irq_restore(saved);
}

/* What is called by its address is C: a kernel built with CFI looks for the hash of its type. */
static void haxm_call(void *call)
{
	haxm_core_call(call);
}

int haxm_os_run_on(u32 cpu, void *call)
{
	return smp_call_function_single(cpu, haxm_call, call, 1);
}

void haxm_os_run_on_all(void *call)
{
	on_each_cpu(haxm_call, call, 1);
}

/* Any interrupt makes a guest exit; this one the kernel sends itself anyway. */
void haxm_os_kick(u32 cpu)
{
	preempt_disable();
	if (cpu < nr_cpu_ids && cpu != smp_processor_id() && cpu_online(cpu))
		smp_send_reschedule(cpu);
	preempt_enable();
}

/*
 * Since 7.x only KVM's modules may change the kernel's copy of CR4. The core is
 * told so (haxm_os_keeps_vmxe), and sets VMXE only while interrupts are off:
 * the kernel does not write CR4 then, nor from NMI or machine-check handlers.
 */
#ifdef HAXM_CR4_DIRECT
static void haxm_write_vmxe(bool on)
{
	unsigned long cr4;

	asm volatile("mov %%cr4, %0" : "=r"(cr4) : : "memory");
	cr4 = on ? cr4 | X86_CR4_VMXE : cr4 & ~X86_CR4_VMXE;
	asm volatile("mov %0, %%cr4" : : "r"(cr4) : "memory");
}
#else
/* A Broadwell cannot trace in VMX operation. perf knows, if it is told, and starts again afterwards. */
static void haxm_write_vmxe(bool on)
{
	if (on) {
		intel_pt_handle_vmx(1);
		cr4_set_bits(X86_CR4_VMXE);
	} else {
		cr4_clear_bits(X86_CR4_VMXE);
		intel_pt_handle_vmx(0);
	}
}
#endif

void haxm_os_set_vmxe(u32 on)
{
	haxm_write_vmxe(on);
}

u32 haxm_os_keeps_vmxe(void)
{
	return !IS_ENABLED(HAXM_CR4_DIRECT);
}

/* The instruction is #UD outside VMX operation; nothing else tells. */
u32 haxm_os_in_vmx_operation(void)
{
	u64 pointer;

	asm goto("1: vmptrst (%0)\n\t"
		 _ASM_EXTABLE(1b, %l[outside])
		 : : "r"(&pointer) : "memory", "cc" : outside);
	return 1;
outside:
	return 0;
}

/* An exit sets TR's limit to 67h, which leaves out the I/O permission bitmap. */
void haxm_os_guest_left(void)
{
#ifdef CONFIG_X86_IOPL_IOPERM
	invalidate_tss_limit();
#endif
}

/* The scheduler counts a switch in the thread that it takes the processor from. */
u64 haxm_os_thread_turn(void)
{
	return (u64)task_pid_nr(current) << 32 |
	       (u32)(current->nvcsw + current->nivcsw);
}

/* The guest spins on something that another of its processors holds. */
void haxm_os_yield(void)
{
	yield();
}

/* What is done on the way to user space, and not before: a signal, another thread's turn. */
#define HAXM_EVENTS (_TIF_SIGPENDING | _TIF_NOTIFY_SIGNAL | _TIF_NEED_RESCHED | _TIF_NOTIFY_RESUME)

u32 haxm_os_event_pending(void)
{
	return (READ_ONCE(current_thread_info()->flags) & HAXM_EVENTS) != 0;
}

/* KVM has left its guest's values in SYSCALL's registers, for when its thread is back or user space is next. */
#ifdef _TIF_USER_RETURN_NOTIFY
#define HAXM_FOREIGN _TIF_USER_RETURN_NOTIFY
#else
#define HAXM_FOREIGN 0
#endif

/*
 * The FPU functions mask preemption, and want interrupts on. The events are
 * looked at when no interrupt can bring one any more: what comes later
 * interrupts the guest. So it is with blocked signals: who sends one counts it,
 * then looks for the guest; here the guest is made known, then the count is looked at.
 * The barrier, and the one in haxm_signal(), see to it that one of the two
 * sees the other.
 */
int haxm_os_guest_begin(u32 signals)
{
	unsigned long flags;

	kernel_fpu_begin();
	local_irq_disable();
	if (unlikely(this_cpu_read(haxm_guest.owed)))
		haxm_signal_owed();
	this_cpu_write(haxm_guest.task, (unsigned long)current);
	smp_mb();
	flags = READ_ONCE(current_thread_info()->flags);
	if (unlikely(flags & HAXM_EVENTS) ||
	    unlikely((u32)atomic_read(haxm_sent_to(current)) != signals)) {
		this_cpu_write(haxm_guest.task, (unsigned long)current | HAXM_OUTSIDE);
		local_irq_enable();
		kernel_fpu_end();
		return -1;
	}
	if (unlikely(flags & HAXM_FOREIGN))
		return HAXM_BEGUN_WITH_FOREIGN_MSRS;
	return raw_smp_processor_id();
}

void haxm_os_guest_end(void)
{
	this_cpu_write(haxm_guest.left, jiffies);
	this_cpu_write(haxm_guest.task, (unsigned long)current | HAXM_OUTSIDE);
#ifdef CONFIG_X86_IOPL_IOPERM
	invalidate_tss_limit();
#endif
	local_irq_enable();
	kernel_fpu_end();
}

void haxm_os_fpu_begin(void)
{
	kernel_fpu_begin();
}

void haxm_os_fpu_end(void)
{
	kernel_fpu_end();
}

u64 haxm_os_monotonic_ns(void)
{
	return ktime_get_ns();
}

static int haxm_cpu_online(unsigned int cpu)
{
	haxm_core_cpu_online();
	return 0;
}

static int haxm_cpu_offline(unsigned int cpu)
{
	haxm_core_cpu_offline();
	return 0;
}

/*
 * Sleep takes all processors but one offline, by the calls above; these are
 * for the last one.
 */
#ifdef HAXM_SYSCORE_DATA
static int haxm_suspend(void *data)
{
	haxm_core_sleep();
	return 0;
}

static void haxm_resume(void *data)
{
	haxm_core_wake();
}

static const struct syscore_ops haxm_sleep_ops = {
	.suspend = haxm_suspend,
	.resume = haxm_resume,
};

static struct syscore haxm_sleep = { .ops = &haxm_sleep_ops };

#define haxm_sleep_register() register_syscore(&haxm_sleep)
#define haxm_sleep_unregister() unregister_syscore(&haxm_sleep)
#else
static int haxm_suspend(void)
{
	haxm_core_sleep();
	return 0;
}

static void haxm_resume(void)
{
	haxm_core_wake();
}

static struct syscore_ops haxm_sleep = {
	.suspend = haxm_suspend,
	.resume = haxm_resume,
};

#define haxm_sleep_register() register_syscore_ops(&haxm_sleep)
#define haxm_sleep_unregister() unregister_syscore_ops(&haxm_sleep)
#endif

/* A processor in VMX operation ignores INIT, so a restart could hang. */
static int haxm_reboot(struct notifier_block *block, unsigned long event, void *data)
{
	haxm_core_reboot();
	return NOTIFY_DONE;
}

static struct notifier_block haxm_reboot_block = {
	.notifier_call = haxm_reboot,
};

static int haxm_hotplug_state;

int haxm_cpu_init(void)
{
	/* Calls haxm_cpu_online() on every running processor. */
	int state = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "virt/haxm:online",
				      haxm_cpu_online, haxm_cpu_offline);

	if (state < 0)
		return state;
	haxm_hotplug_state = state;
	haxm_sleep_register();
	register_reboot_notifier(&haxm_reboot_block);
	return 0;
}

void haxm_cpu_exit(void)
{
	unregister_reboot_notifier(&haxm_reboot_block);
	haxm_sleep_unregister();
	/*
	 * Calls haxm_cpu_offline() on every running processor: no VMX operation
	 * of ours is left on one that then goes offline unheard.
	 */
	cpuhp_remove_state(haxm_hotplug_state);
}
