// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/*
 * A page that the kernel and one process map. Three hold it: this structure,
 * the file that the process maps, and the mapping. Whichever goes last frees
 * it, so neither side ever sees a page that is someone else's.
 */

#include <linux/anon_inodes.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/version.h>

#include "haxm.h"

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
