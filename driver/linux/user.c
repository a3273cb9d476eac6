// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/* A process's address space, where guest RAM lives, and pages shared with it. */

#include <linux/anon_inodes.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/pgtable.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/swap.h>
#include <linux/uaccess.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
#include <linux/unaligned.h>
#else
#include <asm/unaligned.h>
#endif

#include "haxm.h"

/* The fault handler then gives up for any signal, not only a deadly one. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
#define HAXM_FOLL_INTERRUPTIBLE FOLL_INTERRUPTIBLE
#else
#define HAXM_FOLL_INTERRUPTIBLE 0
#endif

struct haxm_user {
	struct mm_struct *mm; /* the structure, not the contents, is held */
	struct mmu_notifier notifier;
	void *listener;
};

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

/*
 * log2 of what the host maps as one around an address: the level at which the
 * page-table walk ends. Page tables are freed only when every processor has
 * had interrupts on, so with them off the walk is safe. The answer may be old
 * when it is used; every change of it is reported to the notifier first, and
 * who uses it checks for such a report, as for the page itself.
 */
static u32 haxm_mapping_shift(struct mm_struct *mm, unsigned long address)
{
	unsigned long flags;
	u32 shift = PAGE_SHIFT;
	pgd_t pgd;
	p4d_t p4d;
	pud_t pud;
	pmd_t pmd;

	local_irq_save(flags);
	pgd = READ_ONCE(*pgd_offset(mm, address));
	if (pgd_none(pgd))
		goto out;
	p4d = READ_ONCE(*p4d_offset(&pgd, address));
	if (p4d_none(p4d) || !p4d_present(p4d))
		goto out;
	pud = READ_ONCE(*pud_offset(&p4d, address));
	if (pud_none(pud) || !pud_present(pud))
		goto out;
	if (pud_leaf(pud)) {
		shift = PUD_SHIFT;
		goto out;
	}
	pmd = READ_ONCE(*pmd_offset(&pud, address));
	if (pmd_none(pmd) || !pmd_present(pmd))
		goto out;
	if (pmd_leaf(pmd))
		shift = PMD_SHIFT;
out:
	local_irq_restore(flags);
	return shift;
}

/* Private memory that will be written sooner or later: one fault, not two. */
static bool haxm_fault_for_write(struct mm_struct *mm, unsigned long address)
{
	struct vm_area_struct *vma;
	bool write;

	mmap_read_lock(mm);
	vma = vma_lookup(mm, address);
	write = vma && vma_is_anonymous(vma) && (vma->vm_flags & VM_WRITE);
	mmap_read_unlock(mm);
	return write;
}

/*
 * Finds the page, brought in if need be, with a reference. *writable says
 * whether it may be written, which a page asked for reading may be too.
 */
static int haxm_find_page(struct mm_struct *mm, unsigned long address, bool write,
			  struct page **page, bool *writable)
{
	struct page *again;
	long got;

	if (get_user_page_fast_only(address, FOLL_WRITE, page)) {
		*writable = true;
		return 0;
	}
	if (!write && get_user_page_fast_only(address, 0, page)) {
		*writable = false;
		return 0;
	}
	*writable = write || haxm_fault_for_write(mm, address);
	got = get_user_pages_unlocked(address, 1, page,
				      (*writable ? FOLL_WRITE : 0) | HAXM_FOLL_INTERRUPTIBLE);
	if (got != 1 && *writable && !write) {
		*writable = false;
		got = get_user_pages_unlocked(address, 1, page, HAXM_FOLL_INTERRUPTIBLE);
	}
	if (got != 1)
		return got < 0 ? got : -EFAULT;
	if (!*writable && get_user_page_fast_only(address, FOLL_WRITE, &again)) {
		put_page(*page);
		*page = again;
		*writable = true;
	}
	return 0;
}

int haxm_os_user_fault_in(void *handle, u64 address, u32 write, u64 *frame,
			  u32 *writable, u32 *shift)
{
	struct haxm_user *user = handle;
	struct page *page;
	bool may_write;
	u32 level;
	u64 pfn;
	int err;

	if (current->mm != user->mm || address >= TASK_SIZE_MAX)
		return -EFAULT;
	address &= PAGE_MASK;
	err = haxm_find_page(user->mm, address, write, &page, &may_write);
	if (err)
		return err == -EAGAIN ? -EINTR : err;
	/* The guest writes without the host's page tables: tell the host now. */
	if (may_write && !PageReserved(page))
		SetPageDirty(page);
	mark_page_accessed(page);
	pfn = page_to_pfn(page);
	put_page(page);

	level = haxm_mapping_shift(user->mm, address);
	/* Aligned alike on both sides, or not one piece. */
	if ((pfn ^ (address >> PAGE_SHIFT)) & ((1ULL << (level - PAGE_SHIFT)) - 1))
		level = PAGE_SHIFT;
	*frame = pfn;
	*writable = may_write;
	*shift = level;
	return 0;
}

/* One function for each size: the kernel's macro makes a label. */
#define HAXM_EXCHANGE(type)                                                     \
	static int haxm_exchange_##type(u64 address, u64 *old, type new)        \
	{                                                                       \
		type seen = *old;                                               \
                                                                                \
		if (__try_cmpxchg_user((type __user *)address, &seen, new,      \
				       missed) < 0)                             \
			return -EFAULT;                                         \
		*old = seen;                                                    \
		return 0;                                                       \
	}

HAXM_EXCHANGE(u8)
HAXM_EXCHANGE(u16)
HAXM_EXCHANGE(u32)
HAXM_EXCHANGE(u64)

/* 16 bytes: the kernel's macro stops at 8. */
static int haxm_exchange_pair(u64 address, u64 *old, const u64 *new)
{
	int err = 0;

	if (!boot_cpu_has(X86_FEATURE_CX16) || !user_access_begin((void __user *)address, 16))
		return -EFAULT;
	asm volatile("1: lock cmpxchg16b %[memory]\n"
		     "2:\n"
		     _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %[err])
		     : [err] "+r" (err), "+a" (old[0]), "+d" (old[1]),
		       [memory] "+m" (*(unsigned __int128 *)address)
		     : "b" (new[0]), "c" (new[1])
		     : "cc");
	user_access_end();
	return err;
}

/*
 * The operand stays in one cache line: there the processor's LOCK is atomic whatever the
 * alignment. A lock that crosses into the next would stop the kernel where split locks are detected.
 */
int haxm_os_user_compare_exchange(u64 address, u32 size, u64 *old, const u64 *new)
{
	if (!access_ok((void __user *)address, size) || (address & 63) + size > 64)
		return -EFAULT;
	switch (size) {
	case 1:
		return haxm_exchange_u8(address, old, *new);
	case 2:
		return haxm_exchange_u16(address, old, *new);
	case 4:
		return haxm_exchange_u32(address, old, *new);
	case 8:
		return haxm_exchange_u64(address, old, *new);
	case 16:
		return address & 15 ? -EFAULT : haxm_exchange_pair(address, old, new);
	default:
		return -EFAULT;
	}
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
	.release = haxm_mm_release,
};

int haxm_os_user_watch(void *handle, void *listener)
{
	struct haxm_user *user = handle;

	if (current->mm != user->mm)
		return -EPERM;
	user->listener = listener;
	user->notifier.ops = &haxm_notifier_ops;
	return mmu_notifier_register(&user->notifier, user->mm);
}

void haxm_os_user_unwatch(void *handle)
{
	struct haxm_user *user = handle;

	mmu_notifier_unregister(&user->notifier, user->mm);
}

/*
 * A page-table entry or the bytes of an instruction: one or two accesses, which
 * overlap if the length is no power of two. An aligned word is read in one piece.
 */
static int haxm_get_small(u64 address, void *to, size_t length)
{
	u64 low, high;
	u32 first, last;

	if (length >= sizeof(u64)) {
		if (get_user(low, (const u64 __user *)address))
			return -EFAULT;
		put_unaligned(low, (u64 *)to);
		if (length == sizeof(u64))
			return 0;
		if (get_user(high, (const u64 __user *)(address + length - sizeof(u64))))
			return -EFAULT;
		put_unaligned(high, (u64 *)(to + length - sizeof(u64)));
		return 0;
	}
	if (get_user(first, (const u32 __user *)address))
		return -EFAULT;
	put_unaligned(first, (u32 *)to);
	if (length == sizeof(u32))
		return 0;
	if (get_user(last, (const u32 __user *)(address + length - sizeof(u32))))
		return -EFAULT;
	put_unaligned(last, (u32 *)(to + length - sizeof(u32)));
	return 0;
}

int haxm_os_copy_in(u64 address, void *to, size_t length)
{
	if (length >= sizeof(u32) && length <= 2 * sizeof(u64))
		return haxm_get_small(address, to, length);
	return copy_from_user(to, (const void __user *)address, length) ? -EFAULT : 0;
}

int haxm_os_copy_out(u64 address, const void *from, size_t length)
{
	return copy_to_user((void __user *)address, from, length) ? -EFAULT : 0;
}

/*
 * A page that the kernel and one process map. Three hold it: this structure,
 * the file that the process maps, and the mapping. Whichever goes last frees
 * it, so neither side ever sees a page that is someone else's.
 */
struct haxm_shared {
	struct page *page;
	struct file *file;
	struct mm_struct *mm;
	unsigned long user;
};

static int haxm_shared_map(struct file *file, struct vm_area_struct *vma)
{
	if (vma->vm_pgoff || vma->vm_end - vma->vm_start != PAGE_SIZE)
		return -EINVAL;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	vm_flags_set(vma, VM_DONTEXPAND | VM_DONTCOPY | VM_DONTDUMP);
#else
	vma->vm_flags |= VM_DONTEXPAND | VM_DONTCOPY | VM_DONTDUMP;
#endif
	return vm_insert_page(vma, vma->vm_start, file->private_data);
}

static int haxm_shared_release(struct inode *inode, struct file *file)
{
	put_page(file->private_data);
	return 0;
}

static const struct file_operations haxm_shared_ops = {
	.owner = THIS_MODULE,
	.mmap = haxm_shared_map,
	.release = haxm_shared_release,
};

void *haxm_os_shared_new(void **kernel, u64 *user)
{
	struct haxm_shared *shared;
	unsigned long address;

	if (!current->mm)
		return NULL;
	shared = kzalloc(sizeof(*shared), GFP_KERNEL_ACCOUNT);
	if (!shared)
		return NULL;
	shared->page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!shared->page)
		goto no_page;
	shared->file = anon_inode_getfile("[haxm]", &haxm_shared_ops, shared->page, O_RDWR);
	if (IS_ERR(shared->file))
		goto no_file;
	get_page(shared->page); /* the file's, put by its release */
	address = vm_mmap(shared->file, 0, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	if (IS_ERR_VALUE(address))
		goto no_mapping;
	shared->mm = current->mm;
	mmgrab(shared->mm);
	shared->user = address;
	*kernel = page_address(shared->page);
	*user = address;
	return shared;

no_mapping:
	fput(shared->file);
no_file:
	put_page(shared->page);
no_page:
	kfree(shared);
	return NULL;
}

/* Whether the process still has our page there, and nothing of its own. */
static bool haxm_shared_is_mapped(struct haxm_shared *shared)
{
	struct vm_area_struct *vma;
	bool ours;

	mmap_read_lock(shared->mm);
	vma = vma_lookup(shared->mm, shared->user);
	ours = vma && vma->vm_file == shared->file && vma->vm_start == shared->user;
	mmap_read_unlock(shared->mm);
	return ours;
}

void haxm_os_shared_free(void *handle)
{
	struct haxm_shared *shared = handle;

	/* Another process cannot unmap it; there it stays until that one ends. */
	if (current->mm == shared->mm && haxm_shared_is_mapped(shared))
		vm_munmap(shared->user, PAGE_SIZE);
	fput(shared->file);
	put_page(shared->page);
	mmdrop(shared->mm);
	kfree(shared);
}
