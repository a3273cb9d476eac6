// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * A process's address space, where guest RAM lives: held, and watched for what
 * becomes of it.
 */

#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "haxm.h"
#include "user.h"

void *haxm_os_user_get(void)
{
	struct haxm_user *user;

	if (!current->mm)
		return NULL;
	user = kzalloc(sizeof(*user), GFP_KERNEL_ACCOUNT);
	if (!user)
		return NULL;
	user->mm = current->mm;
	mmgrab(user->mm);
	return user;
}

void haxm_os_user_put(void *handle)
{
	struct haxm_user *user = handle;

	mmdrop(user->mm);
	kfree(user);
}

u32 haxm_os_user_is_current(void *handle)
{
	struct haxm_user *user = handle;

	return current->mm == user->mm;
}

/* The structure outlives its last user, who is a thread or looks at its memory. */
u32 haxm_os_user_has_ended(void *handle)
{
	struct haxm_user *user = handle;

	return !atomic_read(&user->mm->mm_users);
}

static int haxm_range_start(struct mmu_notifier *notifier,
			    const struct mmu_notifier_range *range)
{
	struct haxm_user *user = container_of(notifier, struct haxm_user, notifier);

	haxm_core_invalidate_begin(user->listener, range->start, range->end);
	return 0;
}

static void haxm_range_end(struct mmu_notifier *notifier,
			   const struct mmu_notifier_range *range)
{
	struct haxm_user *user = container_of(notifier, struct haxm_user, notifier);

	haxm_core_invalidate_end(user->listener, range->start, range->end);
}

/* What the notifier answers with: int, and bool since 7.1. */
typedef typeof(((struct mmu_notifier_ops *)NULL)->test_young(NULL, NULL, 0)) haxm_young_t;

static haxm_young_t haxm_young(struct mmu_notifier *notifier, u64 start, u64 end, u32 aging)
{
	struct haxm_user *user = container_of(notifier, struct haxm_user, notifier);

	return haxm_core_young(user->listener, start, end, aging) != 0;
}

static haxm_young_t haxm_test_young(struct mmu_notifier *notifier, struct mm_struct *mm,
				    unsigned long address)
{
	return haxm_young(notifier, address, address + PAGE_SIZE, HAXM_AGING_LOOK);
}

static haxm_young_t haxm_clear_young(struct mmu_notifier *notifier, struct mm_struct *mm,
				     unsigned long start, unsigned long end)
{
	return haxm_young(notifier, start, end, HAXM_AGING_CLEAR);
}

static haxm_young_t haxm_clear_flush_young(struct mmu_notifier *notifier, struct mm_struct *mm,
					   unsigned long start, unsigned long end)
{
	return haxm_young(notifier, start, end, HAXM_AGING_CLEAR_AND_FLUSH);
}

/* The process ends while something still holds the VM. */
static void haxm_mm_release(struct mmu_notifier *notifier, struct mm_struct *mm)
{
	struct haxm_user *user = container_of(notifier, struct haxm_user, notifier);

	haxm_core_invalidate_begin(user->listener, 0, U64_MAX);
	haxm_core_invalidate_end(user->listener, 0, U64_MAX);
}

static const struct mmu_notifier_ops haxm_notifier_ops = {
	.invalidate_range_start = haxm_range_start,
	.invalidate_range_end = haxm_range_end,
	.test_young = haxm_test_young,
	.clear_young = haxm_clear_young,
	.clear_flush_young = haxm_clear_flush_young,
	.release = haxm_mm_release,
};

int haxm_os_user_watch(void *handle, void *listener)
{
	struct haxm_user *user = handle;
	sigset_t blocked, before;
	int err;

	if (current->mm != user->mm)
		return -EPERM;
	user->listener = listener;
	user->notifier.ops = &haxm_notifier_ops;
	/*
	 * The kernel takes all locks of the process, and gives up when a signal
	 * waits. No client expects that of CREATE_VM: HAXM watched nothing.
	 */
	siginitsetinv(&blocked, sigmask(SIGKILL));
	sigprocmask(SIG_BLOCK, &blocked, &before);
	err = mmu_notifier_register(&user->notifier, user->mm);
	sigprocmask(SIG_SETMASK, &before, NULL);
	return err;
}

void haxm_os_user_unwatch(void *handle)
{
	struct haxm_user *user = handle;

	mmu_notifier_unregister(&user->notifier, user->mm);
}
