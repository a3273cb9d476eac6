//! Into the guest and back: the one stretch of code in which the registers are
//! partly the host's and partly the guest's.
// UNSAFETY: enters the guest, and hands registers between it and the host.
#![expect(unsafe_code)]

use core::arch::asm;
use core::mem::offset_of;

use crate::arch::msr;
use crate::cpu::{GuestRegs, how};

const HOST_RSP: u64 = x86::vmx::vmcs::host::RSP as u64;
const HOST_RIP: u64 = x86::vmx::vmcs::host::RIP as u64;

/// Tells the kernel's objtool that the next instruction, a CALL, stays within the
/// function: its mark up to Linux 6.13, and the one since.
macro_rules! intra_function_call {
    () => {
        concat!(
            ".pushsection .discard.intra_function_calls\n.long 773f - .\n.popsection\n",
            ".pushsection .discard.annotate_insn, \"M\", @progbits, 8\n",
            ".long 773f - .\n.long 7\n.popsection\n773:",
        )
    };
}

/// Enters the guest and comes back at its next exit, or at once if the entry
/// instruction fails. Bit 0 of the result is CF or ZF as the entry instruction
/// left them, the other bits mean nothing: after an exit both flags are clear
/// (SDM 28.5.3 "Loading Host RIP, RSP, RFLAGS, and SSP").
///
/// 1. Save RBX and RBP, which the compiler will not let an asm statement clobber.
/// 2. Push the register block's address; RSP now is the host's for the exit.
/// 3. VMWRITE HOST_RSP if it changed.
/// 4. Load the guest's registers and VMRESUME, if `how` is LAUNCHED alone.
/// 5. Exit and failure meet at label 4: store the guest's registers, unwind.
///
/// Any other `how` branches off to label 6 and comes back to 3 with ZF clear,
/// and again to 5 right before the entry; its exit may land at label 9, which
/// HOST_RIP then names. The plain path has no instruction for any of that.
///
/// # Safety
/// The contract of [`Cpu::enter`](crate::cpu::Cpu::enter). Not inlined: HOST_RIP names the one copy.
#[inline(never)]
pub(super) unsafe extern "sysv64" fn world_switch(regs: *mut GuestRegs) -> u64 {
    let failed: u64;
    // SAFETY: the caller's contract; every register the guest may change is
    // saved here or declared clobbered.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "push rdi",
            // The same value, for the kernel's objtool: from here on the frame is
            // found by RSP, as RBP is about to be the guest's.
            "mov rbp, [rsp + 8]",
            "cmp rsp, [rdi + {host_rsp}]",
            "je 2f",
            "mov [rdi + {host_rsp}], rsp",
            "mov eax, {field_rsp}",
            "vmwrite rax, rsp",
            "2:",
            // The choice rides in the flags: MOV leaves them alone.
            "cmp qword ptr [rdi + {how}], {launched}",
            "jne 6f",
            "3:",
            "mov rax, [rdi + {gpr} + 0*8]",
            "mov rcx, [rdi + {gpr} + 1*8]",
            "mov rdx, [rdi + {gpr} + 2*8]",
            "mov rbx, [rdi + {gpr} + 3*8]",
            "mov rbp, [rdi + {gpr} + 5*8]",
            "mov rsi, [rdi + {gpr} + 6*8]",
            "mov r8,  [rdi + {gpr} + 8*8]",
            "mov r9,  [rdi + {gpr} + 9*8]",
            "mov r10, [rdi + {gpr} + 10*8]",
            "mov r11, [rdi + {gpr} + 11*8]",
            "mov r12, [rdi + {gpr} + 12*8]",
            "mov r13, [rdi + {gpr} + 13*8]",
            "mov r14, [rdi + {gpr} + 14*8]",
            "mov r15, [rdi + {gpr} + 15*8]",
            "jne 5f",
            "mov rdi, [rdi + {gpr} + 7*8]",
            "vmresume",
            "jmp 4f",
            // Any other way in: note it, write HOST_RIP if it is new, switch
            // IA32_SPEC_CTRL.
            "6:",
            "mov rax, [rdi + {how}]",
            "mov [rdi + {was}], rax",
            "mov word ptr [rdi + {selector}], ss",
            "mov rcx, rax",
            "or rcx, {launched}",
            "and rcx, {not_changed}",
            "mov [rdi + {how}], rcx",
            "cmp rcx, rax",
            "je 7f",
            "lea rdx, [rip + 4f]",
            "test al, {fill} + {spec}",
            "jz 8f",
            "lea rdx, [rip + 9f]",
            "8:",
            "mov eax, {field_rip}",
            "vmwrite rax, rdx",
            "7:",
            "test byte ptr [rdi + {how}], {spec}",
            "jz 30f",
            "mov ecx, {spec_msr}",
            "rdmsr",
            "mov [rdi + {host_spec}], eax",
            "cmp eax, [rdi + {guest_spec}]",
            "je 30f",
            "mov eax, [rdi + {guest_spec}]",
            "mov edx, 0",
            "wrmsr",
            "30:",
            "test byte ptr [rdi + {how}], {flush}",
            "jz 19f",
            "cmp qword ptr [rdi + {on_loan}], 1",
            "jne 19f",
            "mov qword ptr [rdi + {on_loan}], 2",
            "mov ecx, {flush_msr}",
            "mov eax, 1",
            "mov edx, 0",
            "wrmsr",
            "19:",
            "test rsp, rsp",
            "jmp 3b",
            // Right before the entry; RDI is not the guest's yet. VERW wants a
            // writable segment's selector: SDM vol. 2, "VERW".
            "5:",
            "test byte ptr [rdi + {was}], {clear}",
            "jz 31f",
            "verw word ptr [rdi + {selector}]",
            "31:",
            "test byte ptr [rdi + {was}], {launched}",
            "mov rdi, [rdi + {gpr} + 7*8]",
            "jz 12f",
            "vmresume",
            "jmp 9f",
            "12:",
            "vmlaunch",
            // Here if the entry failed, and from an exit that has more to do: 32
            // returns that lead nowhere, so that none of the guest's is
            // predicted; then the host's IA32_SPEC_CTRL.
            "9:",
            "pushfq",
            "push rax",
            "push rcx",
            "push rdx",
            "mov ecx, 16",
            "13:",
            intra_function_call!(),
            "call 14f",
            "int3",
            "14:",
            intra_function_call!(),
            "call 16f",
            "int3",
            "16:",
            "add rsp, 2 * 8",
            "dec ecx",
            "jnz 13b",
            "mov rdx, [rsp + 4 * 8]",
            "test byte ptr [rdx + {how}], {spec}",
            "jz 18f",
            "mov ecx, {spec_msr}",
            "rdmsr",
            "mov rdx, [rsp + 4 * 8]",
            "mov [rdx + {guest_spec}], eax",
            "mov eax, [rdx + {host_spec}]",
            "mov edx, 0",
            "wrmsr",
            "18:",
            // Neither of the branches above is foretold wrongly and a return executed
            // behind it.
            "lfence",
            "pop rdx",
            "pop rcx",
            "pop rax",
            "popfq",
            "4:",
            // None of PUSH, MOV and POP touches the flags.
            "push rdi",
            "mov rdi, [rsp + 8]",
            "mov [rdi + {gpr} + 0*8], rax",
            "mov [rdi + {gpr} + 1*8], rcx",
            "mov [rdi + {gpr} + 2*8], rdx",
            "mov [rdi + {gpr} + 3*8], rbx",
            "mov [rdi + {gpr} + 5*8], rbp",
            "mov [rdi + {gpr} + 6*8], rsi",
            "mov [rdi + {gpr} + 8*8], r8",
            "mov [rdi + {gpr} + 9*8], r9",
            "mov [rdi + {gpr} + 10*8], r10",
            "mov [rdi + {gpr} + 11*8], r11",
            "mov [rdi + {gpr} + 12*8], r12",
            "mov [rdi + {gpr} + 13*8], r13",
            "mov [rdi + {gpr} + 14*8], r14",
            "mov [rdi + {gpr} + 15*8], r15",
            "pop qword ptr [rdi + {gpr} + 7*8]",
            "mov eax, 0",
            "setna al",
            "pop rdi",
            "pop rbp",
            "pop rbx",
            // No guest value survives in a register that speculation could use:
            // the compiler's own epilogue loads R12 to R15, which are its
            // caller's.
            "mov ecx, 0",
            "mov edx, 0",
            "mov esi, 0",
            "mov r8d, 0",
            "mov r9d, 0",
            "mov r10d, 0",
            "mov r11d, 0",
            how = const offset_of!(GuestRegs, how),
            guest_spec = const offset_of!(GuestRegs, spec_ctrl),
            host_spec = const offset_of!(GuestRegs, host_spec_ctrl),
            was = const offset_of!(GuestRegs, scratch),
            selector = const offset_of!(GuestRegs, scratch) + 8,
            launched = const how::LAUNCHED,
            not_changed = const !(how::CHANGED as i64),
            clear = const how::CLEAR_BUFFERS,
            fill = const how::FILL_RETURNS,
            spec = const how::SPEC_CTRL,
            flush = const how::FLUSH_L1D,
            on_loan = const offset_of!(GuestRegs, on_loan),
            flush_msr = const msr::IA32_FLUSH_CMD,
            spec_msr = const msr::IA32_SPEC_CTRL,
            gpr = const offset_of!(GuestRegs, gpr),
            host_rsp = const offset_of!(GuestRegs, host_rsp),
            field_rsp = const HOST_RSP,
            field_rip = const HOST_RIP,
            inout("rdi") regs => _,
            out("rsi") _,
            out("rax") failed,
            out("rcx") _, out("rdx") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
    failed
}
