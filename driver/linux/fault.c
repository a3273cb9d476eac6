// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/* Where a process's pages are: looked up in its page tables, and brought in. */

#include <linux/mm.h>
#include <linux/mmu_context.h>
#include <linux/pgtable.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/swap.h>
#include <linux/userfaultfd_k.h>
#include <linux/version.h>

#include "haxm.h"
#include "user.h"

/* The fault handler then gives up for any signal, not only a deadly one. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
#define HAXM_FOLL_INTERRUPTIBLE FOLL_INTERRUPTIBLE
#else
#define HAXM_FOLL_INTERRUPTIBLE 0
#endif

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
	/* A large page that is there is not copied, and so split, for being read. */
	if (!found && (write || level == PAGE_SHIFT)) {
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
