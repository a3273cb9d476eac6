// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/* Kernel memory and locks. */

#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/lockdep.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

#include "haxm.h"

/*
 * For Rust's allocator. May sleep: nothing is allocated under a spin lock.
 * kmalloc aligns to the size if that is a power of two, and vmalloc to pages.
 */
void *haxm_os_alloc(size_t size, size_t align)
{
	if (align > PAGE_SIZE || size > INT_MAX)
		return NULL;
	if (align > ARCH_KMALLOC_MINALIGN)
		size = roundup_pow_of_two(max(size, align));
	return kvmalloc(size, GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
}

void haxm_os_free(void *memory)
{
	kvfree(memory);
}

void *haxm_os_page_alloc(u64 *physical)
{
	void *page = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);

	if (page)
		*physical = virt_to_phys(page);
	return page;
}

void haxm_os_page_free(void *page)
{
	free_page((unsigned long)page);
}

/*
 * A lockdep class for each vmx::sync::LockClass, so that lockdep sees their
 * order and not one lock taken again and again.
 */
static struct lock_class_key haxm_lock_keys[HAXM_LOCK_CLASSES];

void *haxm_os_mutex_new(u32 class, const char *name)
{
	struct mutex *lock;

	if (class >= HAXM_LOCK_CLASSES)
		return NULL;
	lock = kmalloc(sizeof(*lock), GFP_KERNEL_ACCOUNT);
	if (!lock)
		return NULL;
	mutex_init(lock);
	lockdep_set_class_and_name(lock, &haxm_lock_keys[class], name);
	return lock;
}

void haxm_os_mutex_lock(void *lock)
{
	mutex_lock(lock);
}

void haxm_os_mutex_unlock(void *lock)
{
	mutex_unlock(lock);
}

/* Raw: it is taken with preemption off, where PREEMPT_RT's other kind may not be. */
void *haxm_os_spin_new(u32 class, const char *name)
{
	raw_spinlock_t *lock;

	if (class >= HAXM_LOCK_CLASSES)
		return NULL;
	lock = kmalloc(sizeof(*lock), GFP_KERNEL_ACCOUNT);
	if (!lock)
		return NULL;
	raw_spin_lock_init(lock);
	lockdep_set_class_and_name(lock, &haxm_lock_keys[class], name);
	return lock;
}

void haxm_os_spin_lock(void *lock) __acquires(lock)
{
	raw_spin_lock(lock);
}

void haxm_os_spin_unlock(void *lock) __releases(lock)
{
	raw_spin_unlock(lock);
}
