/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * The border between the two halves of haxm.ko.
 *
 * haxm_os_*    the C half, called by Rust (declared again in src/ffi.rs)
 * haxm_core_*  the Rust half, called by C (defined in src/entry.rs)
 *
 * Only integers and opaque pointers cross it, so the Rust half is the same
 * for every kernel. Errors are 0 or a negative errno.
 */
#ifndef HAXM_H
#define HAXM_H

#include <linux/atomic.h>
#include <linux/hash.h>
#include <linux/percpu-defs.h>
#include <linux/types.h>
#include <linux/version.h>

#if !defined(CONFIG_X86_64)
#error "haxm is for 64-bit kernels"
#endif
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "haxm needs Linux 6.1 or later"
#endif

/* Node kinds, and the limits of the ABI that the minor numbers are made of. */
#define HAXM_NODE_SYSTEM 0
#define HAXM_NODE_VM 1
#define HAXM_NODE_VCPU 2
#define HAXM_VMS 64
#define HAXM_VCPUS 16

#define HAXM_LOCK_CLASSES 16

/* vmx::host::Aging */
#define HAXM_AGING_LOOK 0
#define HAXM_AGING_CLEAR 1
#define HAXM_AGING_CLEAR_AND_FLUSH 2

/* module.c: log and end of the world */
void haxm_os_log(u32 level, const u8 *text, size_t length);
void haxm_os_panic(const u8 *text, size_t length);

/* memory.c: kernel memory and locks */
void *haxm_os_alloc(size_t size, size_t align);
void haxm_os_free(void *memory);
void *haxm_os_page_alloc(u64 *physical);
void haxm_os_page_free(void *page);
/* The name stays while the module does; the class is below HAXM_LOCK_CLASSES. */
void *haxm_os_mutex_new(u32 class, const char *name);
void haxm_os_mutex_lock(void *lock);
void haxm_os_mutex_unlock(void *lock);
void *haxm_os_spin_new(u32 class, const char *name);
void haxm_os_spin_lock(void *lock);
void haxm_os_spin_unlock(void *lock);

/* cpu.c: processors */
u32 haxm_os_cpu_limit(void);
u32 haxm_os_cpu_current(void);
void haxm_os_preempt_off(void);
void haxm_os_preempt_on(void);
size_t haxm_os_irq_save(void);
void haxm_os_irq_restore(size_t saved);
int haxm_os_run_on(u32 cpu, void *call);
void haxm_os_run_on_all(void *call);
void haxm_os_kick(u32 cpu);
void haxm_os_set_vmxe(u32 on);
u32 haxm_os_keeps_vmxe(void);
u32 haxm_os_in_vmx_operation(void);
u32 haxm_os_mitigations(void);
void haxm_os_guest_left(void);
u32 haxm_os_event_pending(void);
u64 haxm_os_thread_turn(void);
void haxm_os_yield(void);
/* As the processor's number, but another hypervisor's values are in SYSCALL's registers. */
#define HAXM_BEGUN_WITH_FOREIGN_MSRS (-2)
int haxm_os_guest_begin(u32 signals);
void haxm_os_guest_end(void);
void haxm_os_fpu_begin(void);
void haxm_os_fpu_end(void);
u64 haxm_os_monotonic_ns(void);

/* signal.c: signals that end RUN though they are blocked */
u32 haxm_os_hears_signals(void);
u32 haxm_os_signals_sent(void);

/* user.c: a process's address space */
void *haxm_os_user_get(void);
void haxm_os_user_put(void *user);
u32 haxm_os_user_is_current(void *user);
u32 haxm_os_user_has_ended(void *user);
int haxm_os_user_watch(void *user, void *listener);
void haxm_os_user_unwatch(void *user);

/* fault.c: where its pages are */
int haxm_os_user_fault_in(void *user, u64 address, u32 write, u32 ahead,
			  u64 *frame, u32 *writable, u32 *shift);
void haxm_os_user_present(void *user, u64 first, size_t wanted, u64 *pages,
			  size_t count);

/* pin.c: its pages held in place */
u32 haxm_os_user_pins(void);
int haxm_os_user_pin(void *user, u64 start, size_t count, void **pins);
u64 haxm_os_user_pinned(void *pins, size_t index);
void haxm_os_user_unpin(void *pins);

/* copy.c: the calling process's memory */
int haxm_os_copy_in(u64 address, void *to, size_t length);
int haxm_os_copy_out(u64 address, const void *from, size_t length);
int haxm_os_user_compare_exchange(u64 address, u32 size, u64 *old,
				  const u64 *new);

/* shared.c: pages that the kernel and one process map */
void *haxm_os_shared_new(void **kernel, u64 *user);
void haxm_os_shared_free(void *shared);

/* device.c: device nodes */
int haxm_os_node_create(u32 kind, u32 vm, u32 vcpu);
void haxm_os_node_remove(u32 kind, u32 vm, u32 vcpu);

/* Between the C files. */
int haxm_devices_init(void);
void haxm_devices_exit(void);
int haxm_cpu_init(void);
void haxm_signal_init(void);
void haxm_signal_exit(void);
void haxm_cpu_exit(void);

/* A thread and the processor that its guest has. */
struct haxm_guest {
	/* The last one; with HAXM_OUTSIDE if its guest is not running now. */
	unsigned long task;
	/* When it left its guest, in jiffies. */
	unsigned long left;
	/* Processors to interrupt when the next one starts. */
	u32 owed;
	u32 cpus[HAXM_VCPUS - 1];
};
#define HAXM_OUTSIDE 1ul
DECLARE_PER_CPU(struct haxm_guest, haxm_guest);
void haxm_signal_owed(void);

/*
 * Signals sent to threads that block them. Threads that share a place end each other's
 * RUN without need, and that is all.
 */
#define HAXM_PLACES_LOG 6
extern atomic_t haxm_sent[1 << HAXM_PLACES_LOG];

static inline atomic_t *haxm_sent_to(struct task_struct *task)
{
	return &haxm_sent[hash_ptr(task, HAXM_PLACES_LOG)];
}

/* The Rust half. */
void haxm_core_set_log_level(u32 level);
/* Kernel memory held: pages, and bytes besides. */
u64 haxm_core_pages(void);
u64 haxm_core_bytes(void);
int haxm_core_load(void);
void haxm_core_unload(void);
/* Gives *handle, which the other file operations take. */
int haxm_core_open(u32 kind, u32 vm, u32 vcpu, void **handle);
void haxm_core_release(void *handle);
long haxm_core_ioctl(void *handle, u32 number, u64 argument);
/* Runs what haxm_os_run_on(_all) was given. Interrupts are off. */
void haxm_core_call(void *call);
/* Bytes first..last of the watched process change. Must not sleep. */
void haxm_core_invalidate_begin(void *listener, u64 start, u64 end);
void haxm_core_invalidate_end(void *listener, u64 start, u64 end);
/* Whether a guest has used a page of them; aging is a HAXM_AGING_. Must not sleep. */
u32 haxm_core_young(void *listener, u64 start, u64 end, u32 aging);
/* Called on the processor that came or goes, unable to migrate. */
void haxm_core_cpu_online(void);
void haxm_core_cpu_offline(void);
/* Called on the last running processor, with interrupts off. */
void haxm_core_sleep(void);
void haxm_core_wake(void);
/* The machine restarts or halts. All processors run, interrupts on. */
void haxm_core_reboot(void);

#endif
