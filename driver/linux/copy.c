// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only
/* Reading and writing the calling process's memory, also in one atomic step. */

#include <linux/uaccess.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
#include <linux/unaligned.h>
#else
#include <asm/unaligned.h>
#endif

#include "haxm.h"

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
