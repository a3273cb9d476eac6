// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/* A process's address space, where guest RAM lives, and pages shared with it. */

#include <linux/anon_inodes.h>
#include <linux/capability.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/mmu_context.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/pgtable.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/overflow.h>
#include <linux/slab.h>
#include <linux/swap.h>
#include <linux/uaccess.h>
#include <linux/userfaultfd_k.h>
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

/* The structure outlives its last user, who is a thread or looks at its memory. */
u32 haxm_os_user_has_ended(void *handle)
{
	struct haxm_user *user = handle;

	return !atomic_read(&user->mm->mm_users);
}

/*
 * The page-table entry that maps an address, as far down as there is one, and
 * log2 of the size of what it maps. *pmd is what the lowest directory says, none
 * if the walk ends above it. Interrupts are off: page tables are freed only when
 * every processor has had them on, so the walk is safe. The answer may be old
 * when it is used; every change of it is reported to the notifier first, and
 * who uses it checks for such a report.
 */
static u32 haxm_walk(struct mm_struct *mm, unsigned long address, pmd_t *pmd)
{
	pgd_t pgd;
	p4d_t p4d;
	pud_t pud;

	*pmd = __pmd(0);
	pgd = READ_ONCE(*pgd_offset(mm, address));
	if (pgd_none(pgd))
		return PAGE_SHIFT;
	p4d = READ_ONCE(*p4d_offset(&pgd, address));
	if (p4d_none(p4d) || !p4d_present(p4d))
		return PAGE_SHIFT;
	pud = READ_ONCE(*pud_offset(&p4d, address));
	if (pud_none(pud) || !pud_present(pud))
		return PAGE_SHIFT;
	if (pud_leaf(pud))
		return PUD_SHIFT;
	*pmd = READ_ONCE(*pmd_offset(&pud, address));
	if (!pmd_none(*pmd) && pmd_present(*pmd) && pmd_leaf(*pmd))
		return PMD_SHIFT;
	return PAGE_SHIFT;
}

/* log2 of what the host maps as one around an address. */
static u32 haxm_mapping_shift(struct mm_struct *mm, unsigned long address)
{
	unsigned long flags;
	u32 shift;
	pmd_t pmd;

	local_irq_save(flags);
	shift = haxm_walk(mm, address, &pmd);
	local_irq_restore(flags);
	return shift;
}

/*
 * A page as vmx::host::PresentPage has it. Not one of memory that is not RAM, nor
 * the zero page (special), nor one whose use the scheduler samples. It may be
 * written only if the entry is dirty: the guest writes without this entry, and
 * whoever takes the entry away then still finds the page to have been written.
 */
static u64 haxm_present(pte_t pte)
{
	const pteval_t needed = _PAGE_PRESENT | _PAGE_USER;
	pteval_t flags = pte_flags(pte);

	if ((flags & needed) != needed || pte_special(pte))
		return 0;
	return (u64)pte_pfn(pte) << PAGE_SHIFT | 1 |
	       ((flags & _PAGE_RW) && pte_dirty(pte) ? 2 : 0);
}

void haxm_os_user_present(void *handle, u64 first, size_t wanted, u64 *pages, size_t count)
{
	struct haxm_user *user = handle;
	unsigned long address, flags;
	size_t index, from, end;
	const pte_t *table;
	pmd_t pmd;

	if (current->mm != user->mm || wanted >= count || first >= TASK_SIZE_MAX ||
	    count * PAGE_SIZE > TASK_SIZE_MAX - first)
		return;
	address = first + wanted * PAGE_SIZE;
	/* The part of the range that the table of the wanted page maps. */
	from = wanted - min_t(size_t, wanted, pte_index(address));
	end = min_t(size_t, count, wanted + PTRS_PER_PTE - pte_index(address));

	local_irq_save(flags);
	if (haxm_walk(user->mm, address, &pmd) != PAGE_SHIFT || pmd_none(pmd) ||
	    !pmd_present(pmd))
		goto out;
	table = (const pte_t *)pmd_page_vaddr(pmd) + pte_index(address) - (wanted - from);
	if (!haxm_present(READ_ONCE(table[wanted - from])))
		goto out;
	for (index = from; index < end; index++)
		pages[index] = haxm_present(READ_ONCE(table[index - from]));
out:
	local_irq_restore(flags);
}

/*
 * Brings in a page of private memory, for writing as it will be written sooner
 * or later, and pages behind it that the guest will probably want next. Does not
 * wait for a disk or for anybody, and gives up at the first trouble: the caller
 * looks what came of it.
 */
static void haxm_bring_in(struct mm_struct *mm, unsigned long address, u32 count)
{
	const unsigned int flags = FAULT_FLAG_WRITE | FAULT_FLAG_ALLOW_RETRY |
				   FAULT_FLAG_RETRY_NOWAIT;
	struct vm_area_struct *vma;
	unsigned long end;

	mmap_read_lock(mm);
	vma = vma_lookup(mm, address);
	if (!vma || !vma_is_anonymous(vma) || !(vma->vm_flags & VM_WRITE) ||
	    !arch_vma_access_permitted(vma, true, false, false) || userfaultfd_armed(vma))
		goto out;
	end = min(vma->vm_end, address + count * PAGE_SIZE);
	for (; address < end && !signal_pending(current); address += PAGE_SIZE) {
		vm_fault_t result = handle_mm_fault(vma, address, flags, NULL);

		/* Done, and the lock is gone: not for this kind of memory, but it may be. */
		if (result & VM_FAULT_COMPLETED)
			return;
		if (result & (VM_FAULT_ERROR | VM_FAULT_RETRY))
			break;
	}
out:
	mmap_read_unlock(mm);
}

/* Where a page is that the host's page tables let be written, and its mapping's size. */
static u64 haxm_written(struct mm_struct *mm, unsigned long address, u32 *shift)
{
	unsigned long flags;
	u64 found = 0;
	pmd_t pmd;

	local_irq_save(flags);
	*shift = haxm_walk(mm, address, &pmd);
	if (*shift == PMD_SHIFT) {
		/* An entry for 2 MB has these flags where one for 4 KB has them. */
		found = haxm_present(__pte(pmd_flags(pmd) & PTE_FLAGS_MASK));
		if (found)
			found |= (u64)(pmd_pfn(pmd) + pte_index(address)) << PAGE_SHIFT;
	} else if (*shift == PAGE_SHIFT && !pmd_none(pmd) && pmd_present(pmd)) {
		const pte_t *table = (const pte_t *)pmd_page_vaddr(pmd);

		found = haxm_present(READ_ONCE(table[pte_index(address)]));
	}
	local_irq_restore(flags);
	return found & 2 ? found & PTE_PFN_MASK : 0;
}

/*
 * Finds the page, brought in if need be, with a reference. *writable says
 * whether it may be written, which a page asked for reading may be too.
 */
static int haxm_find_page(unsigned long address, bool write, struct page **page,
			  bool *writable)
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
	*writable = write;
	got = get_user_pages_unlocked(address, 1, page,
				      (write ? FOLL_WRITE : 0) | HAXM_FOLL_INTERRUPTIBLE);
	if (got != 1)
		return got < 0 ? got : -EFAULT;
	if (!write && get_user_page_fast_only(address, FOLL_WRITE, &again)) {
		put_page(*page);
		*page = again;
		*writable = true;
	}
	return 0;
}

int haxm_os_user_fault_in(void *handle, u64 address, u32 write, u32 ahead,
			  u64 *frame, u32 *writable, u32 *shift)
{
	struct haxm_user *user = handle;
	struct page *page;
	bool may_write;
	u64 found, pfn;
	u32 level;
	int err;

	if (current->mm != user->mm || address >= TASK_SIZE_MAX)
		return -EFAULT;
	address &= PAGE_MASK;
	found = haxm_written(user->mm, address, &level);
	if (!found) {
		haxm_bring_in(user->mm, address, 1 + ahead);
		found = haxm_written(user->mm, address, &level);
	}
	if (found) {
		pfn = found >> PAGE_SHIFT;
		may_write = true;
	} else {
		err = haxm_find_page(address, write, &page, &may_write);
		if (err)
			return err == -EAGAIN ? -EINTR : err;
		/* The guest writes without the host's page tables: tell the host now. */
		if (may_write && !PageReserved(page))
			SetPageDirty(page);
		mark_page_accessed(page);
		pfn = page_to_pfn(page);
		put_page(page);
		level = haxm_mapping_shift(user->mm, address);
	}
	/* Aligned alike on both sides, or not one piece. */
	if ((pfn ^ (address >> PAGE_SHIFT)) & ((1ULL << (level - PAGE_SHIFT)) - 1))
		level = PAGE_SHIFT;
	*frame = pfn;
	*writable = may_write;
	*shift = level;
	return 0;
}

/*
 * Memory held in place, for those who want that instead (parameter pin): frames
 * of one piece of at most 2 MB. It counts against what the process may lock.
 */
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
