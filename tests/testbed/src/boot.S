# The boot sector of the emulated PC: loads the extents named in the info page from the IDE disk
# by PIO, collects the BIOS memory map, and enters a Linux kernel at its PVH (32-bit) entry point.
#
# Disk: LBA 0 this sector; LBA 1..8 the info page, loaded to 0x20000 (disk.rs writes it):
#   +0x000 hvm_start_info      +0x040 hvm_modlist_entry
#   +0x080 u32 entry point
#   +0x200 command line        +0x800 extents {u32 lba, u32 sectors, u32 destination}, ended by sectors = 0
# The memory map goes to 0x21000, 24 bytes an entry (hvm_memmap_table_entry).
	.set	INFO, 0x20000

	.code16
	.globl	_start
_start:
	ljmp	$0, $1f
1:	cli
	cld
	xor	%ax, %ax
	mov	%ax, %ds
	mov	%ax, %ss
	mov	$0x7c00, %sp
	mov	$0x2100, %ax
	mov	%ax, %es
	xor	%di, %di
	xor	%ebx, %ebx
	xor	%bp, %bp
2:	mov	$0xe820, %eax
	mov	$20, %ecx
	mov	$0x534d4150, %edx	# "SMAP"
	int	$0x15
	jc	3f
	movl	$0, %es:20(%di)
	add	$24, %di
	inc	%bp
	test	%ebx, %ebx
	jnz	2b
3:	in	$0x92, %al		# A20 on, without touching the reset bit
	or	$2, %al
	and	$0xfe, %al
	out	%al, $0x92
	cli
	lgdtl	gdtr
	mov	%cr0, %eax
	or	$1, %al
	mov	%eax, %cr0
	ljmpl	$0x08, $protected

	.code32
protected:
	mov	$0x10, %ax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss
	mov	$0x7c00, %esp
	xor	%eax, %eax
	mov	%ax, %fs
	mov	%ax, %gs
	mov	$0x18, %ax
	ltr	%ax
	mov	$0x11, %eax		# PE and ET; caches on
	mov	%eax, %cr0
	mov	$2, %al			# nIEN: no disk interrupts
	mov	$0x3f6, %dx
	out	%al, %dx
	mov	$1, %esi
	mov	$8, %ebx
	mov	$INFO, %edi
	call	read
	movzwl	%bp, %eax
	mov	%eax, INFO+0x30		# memmap_entries
	mov	$INFO+0x800, %ebp
4:	mov	0(%ebp), %esi
	mov	4(%ebp), %ebx
	mov	8(%ebp), %edi
	add	$12, %ebp
	test	%ebx, %ebx
	jz	5f
	call	read
	jmp	4b

5:	xor	%ebp, %ebp
	mov	$INFO, %ebx
	jmp	*INFO+0x80

# esi = first sector, ebx = count, edi = destination
read:	mov	$128, %ecx
	cmp	%ecx, %ebx
	jae	1f
	mov	%ebx, %ecx
1:	mov	$0x1f2, %edx
	mov	%cl, %al
	out	%al, %dx
	mov	%esi, %eax
	inc	%edx
	out	%al, %dx
	shr	$8, %eax
	inc	%edx
	out	%al, %dx
	shr	$8, %eax
	inc	%edx
	out	%al, %dx
	shr	$8, %eax
	and	$0xf, %al
	or	$0xe0, %al
	inc	%edx
	out	%al, %dx
	inc	%edx
	mov	$0x20, %al
	out	%al, %dx
	add	%ecx, %esi
	sub	%ecx, %ebx
2:	mov	$0x1f7, %dx
3:	in	%dx, %al
	test	$0x80, %al
	jnz	3b
	test	$0x08, %al
	jz	3b
	push	%ecx
	mov	$0x1f0, %dx
	mov	$128, %ecx
	rep insl
	pop	%ecx
	loop	2b
	test	%ebx, %ebx
	jnz	read
	ret

	.align	8
gdt:	.quad	0
	.quad	0x00cf9b000000ffff
	.quad	0x00cf93000000ffff
	.quad	0x0000890000000067
gdtr:	.word	gdtr-gdt-1
	.long	gdt
	.org	510
	.word	0xaa55
