// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * Guest RAM held in place, for those who want that instead (parameter pin): frames
 * of one piece of at most 2 MB. It counts against what the process may lock.
 */

#include <linux/capability.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/overflow.h>
#include <linux/pgtable.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "haxm.h"
#include "user.h"

struct haxm_pins {
	struct mm_struct *mm;
	unsigned long count;
	bool writable;
	struct page *pages[];
};

static bool haxm_pin;
module_param_named(pin, haxm_pin, bool, 0444);
MODULE_PARM_DESC(pin, "hold guest RAM in place instead of following the host's page tables (default no)");

u32 haxm_os_user_pins(void)
{
	return haxm_pin;
}

static int haxm_account(struct mm_struct *mm, unsigned long count)
{
	unsigned long most = rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT;

	if (atomic64_add_return(count, &mm->pinned_vm) > most && !capable(CAP_IPC_LOCK)) {
		atomic64_sub(count, &mm->pinned_vm);
		return -ENOMEM;
	}
	return 0;
}

int haxm_os_user_pin(void *handle, u64 start, size_t count, void **result)
{
	struct haxm_user *user = handle;
	unsigned int flags = FOLL_WRITE | FOLL_LONGTERM;
	struct haxm_pins *pins;
	int got, err;

	if (current->mm != user->mm || !count || count > PTRS_PER_PMD ||
	    start >= TASK_SIZE_MAX || count * PAGE_SIZE > TASK_SIZE_MAX - start)
		return -EFAULT;
	pins = kvzalloc(struct_size(pins, pages, count), GFP_KERNEL_ACCOUNT);
	if (!pins)
		return -ENOMEM;
	err = haxm_account(user->mm, count);
	if (err)
		goto no_pages;
	got = pin_user_pages_fast(start, count, flags, pins->pages);
	pins->writable = got > 0;
	if (got == -EFAULT)
		got = pin_user_pages_fast(start, count, FOLL_LONGTERM, pins->pages);
	if (got != count) {
		if (got > 0)
			unpin_user_pages(pins->pages, got);
		err = got < 0 ? got : -EFAULT;
		goto not_pinned;
	}
	pins->count = count;
	pins->mm = user->mm;
	mmgrab(pins->mm);
	*result = pins;
	return 0;

not_pinned:
	atomic64_sub(count, &user->mm->pinned_vm);
no_pages:
	kvfree(pins);
	return err;
}

/* As vmx::host::PresentPage has it. */
u64 haxm_os_user_pinned(void *handle, size_t index)
{
	struct haxm_pins *pins = handle;

	if (index >= pins->count)
		return 0;
	return (u64)page_to_pfn(pins->pages[index]) << PAGE_SHIFT | 1 | (pins->writable ? 2 : 0);
}

void haxm_os_user_unpin(void *handle)
{
	struct haxm_pins *pins = handle;

	unpin_user_pages_dirty_lock(pins->pages, pins->count, pins->writable);
	atomic64_sub(pins->count, &pins->mm->pinned_vm);
	mmdrop(pins->mm);
	kvfree(pins);
}
