/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/* A process's address space, as the C files that work on it see it. */
#ifndef HAXM_USER_H
#define HAXM_USER_H

#include <linux/mm_types.h>
#include <linux/mmu_notifier.h>

struct haxm_user {
	struct mm_struct *mm; /* the structure, not the contents, is held */
	struct mmu_notifier notifier;
	void *listener;
};

#endif
