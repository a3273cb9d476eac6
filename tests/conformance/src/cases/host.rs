//! What the host does beside a running guest: it forks, moves and discards memory, uses huge pages, takes
//! processors away, and owns device nodes.
// UNSAFETY: fork, mremap and other process calls.
#![expect(unsafe_code)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use abi::os::linux as number;
use anyhow::{Context, Result, bail, ensure};

use super::{Case, Outcome};
use crate::client::{System, Vm};
use crate::code::Code;
use crate::exit::{Exit, halt, out};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, Mode};
use crate::process::{Placed, after_fork, in_child};
use crate::ram::Ram;

pub const CASES: &[Case] = &[
    case!(interrupts_a_guest_that_masks_them in SIZES),
    case!(a_child_keeps_its_copy in WIDE),
    case!(a_child_changes_its_copy in WIDE),
    case!(discarded_pages_are_zero in WIDE),
    case!(moved_pages_are_followed in WIDE),
    case!(huge_pages_are_split),
    case!(processors_come_and_go in WIDE),
    case!(nodes_belong_to_their_creator),
    case!(the_client_keeps_its_vector_registers),
    case!(the_client_keeps_its_gs_base),
];

/// Where the guests count.
const COUNTER: u64 = 0x11_0000;
const PAGE: u64 = 4096;

/// Counts once per RUN.
fn counting() -> Code {
    guest!(
        "mov ecx, 0x110000",
        "2: inc dword ptr [ecx]",
        "hlt",
        "jmp 2b"
    )
}

/// One more RUN, after which the guest's counter is `wanted`.
fn count(machine: &Machine, wanted: u32, when: &str) -> Outcome {
    machine.expect(&[halt()])?;
    same!(machine.ram.u32(COUNTER), wanted, "count {when}");
    Ok(())
}

/// SDM 26.2 "Other Causes of VM Exits": with external-interrupt exiting, IF does not block them.
fn interrupts_a_guest_that_masks_them(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("cli", "2: jmp 2b"))?;
    super::interrupts::ends_by_the_timer(&machine, 3)
}

/// The page is writable in the EPT when the process forks: the guest must not write the child's copy.
fn a_child_keeps_its_copy(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, counting())?;
    count(&machine, 1, "at first")?;
    for round in 1..4 {
        let parent = || count(&machine, round + 1, "after fork");
        let seen = after_fork(parent, || machine.ram.u32(COUNTER))?;
        same!(seen, round, "what the child sees");
    }
    Ok(())
}

fn a_child_changes_its_copy(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, counting())?;
    count(&machine, 1, "at first")?;
    let code = in_child(|| {
        machine.ram.write_u32(COUNTER, 77);
        machine.ram.u32(COUNTER) as u8
    })?;
    same!(code, 77, "the child's own count");
    count(&machine, 2, "after the child changed its own")
}

fn discarded_pages_are_zero(mode: Mode) -> Outcome {
    borrowed_only!();
    let machine = Machine::new(mode, counting())?;
    count(&machine, 1, "at first")?;
    count(&machine, 2, "again")?;
    machine.ram.discard(COUNTER, PAGE);
    count(&machine, 1, "after the page was given back")
}

/// Another page takes the place of the guest's.
fn moved_pages_are_followed(mode: Mode) -> Outcome {
    borrowed_only!();
    let machine = Machine::new(mode, counting())?;
    count(&machine, 1, "at first")?;
    for value in [100, 200] {
        let other = Ram::new(PAGE);
        other.write_u32(0, value);
        let place = machine.ram.address() + COUNTER;
        // SAFETY: both are whole pages of mappings of ours, to which nothing holds a reference.
        let moved = unsafe {
            libc::mremap(
                other.address() as *mut libc::c_void,
                PAGE as usize,
                PAGE as usize,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                place as *mut libc::c_void,
            )
        };
        ensure!(moved as u64 == place, "mremap failed");
        count(&machine, value + 1, "of the page that took its place")?;
    }
    Ok(())
}

/// A setting of the kernel, put back when dropped.
struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    /// `None` where the kernel has no such setting.
    fn change(path: &'static str, value: &str) -> Result<Option<Self>> {
        if !Path::new(path).exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(path)?;
        // A choice is printed as "a [b] c".
        let chosen = text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        let before = chosen.map_or(text.trim(), |(word, _)| word).to_owned();
        fs::write(path, value).with_context(|| format!("cannot write {path}"))?;
        Ok(Some(Self { path, before }))
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // The next case that depends on it says so.
        let _ = fs::write(self.path, &self.before);
    }
}

/// The guest fills two megabytes that the host may map as one page; then the host takes one small page out of
/// the middle. The guest sees that one empty and all others as they were.
fn huge_pages_are_split() -> Outcome {
    borrowed_only!();
    const START: u64 = 0x40_0000;
    const HUGE: u64 = 0x20_0000;
    const GONE: u64 = 0x12_3000;
    let _huge = Setting::change("/sys/kernel/mm/transparent_hugepage/enabled", "always")?;
    // Fills, halts, and then adds up.
    let code = guest!(
        "mov ecx, 0x400000",
        "2: mov dword ptr [ecx], ecx",
        "add ecx, 0x1000",
        "cmp ecx, 0x600000",
        "jb 2b",
        "hlt",
        "mov ecx, 0x400000",
        "xor eax, eax",
        "3: add eax, dword ptr [ecx]",
        "add ecx, 0x1000",
        "cmp ecx, 0x600000",
        "jb 3b",
        "hlt"
    );
    // Without paging every address is the guest's.
    let machine = Machine::new(Mode::Protected, code)?;
    let more = Ram::new(2 * HUGE);
    let offset = more.address().next_multiple_of(HUGE) - more.address();
    let start = more.address() + offset;
    machine.vm.add_ramblock(start, HUGE)?;
    machine.vm.set_ram(START, HUGE as u32, 0, start)?;
    machine.expect(&[halt()])?;
    for page in (0..HUGE).step_by(PAGE as usize) {
        same!(
            u64::from(more.u32(offset + page)),
            START + page,
            "page {page:#x}"
        );
    }
    more.discard(offset + GONE, PAGE);
    machine.expect(&[halt()])?;
    let sum: u64 = (0..HUGE)
        .step_by(PAGE as usize)
        .map(|page| START + page)
        .sum();
    let wanted = (sum - START - GONE) & 0xffff_ffff;
    same!(
        machine.regs()?.rax & 0xffff_ffff,
        wanted,
        "sum over all pages"
    );
    Ok(())
}

/// Takes the second processor away, if there is one, and brings it back, with the VMCS on either.
fn processors_come_and_go(mode: Mode) -> Outcome {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";
    let machine = Machine::new(mode, counting())?;
    count(&machine, 1, "at first")?;
    let mut wanted = 1;
    let mut next = |when| {
        wanted += 1;
        count(&machine, wanted, when)
    };
    for _ in 0..2 {
        if Path::new(ONLINE).exists() {
            let _here = Placed::on(1)?;
            next("on the second processor")?;
            let gone = Setting::change(ONLINE, "0")?;
            next("after it went")?;
            drop(gone);
            let online = fs::read_to_string(ONLINE)?;
            same!(online.trim(), "1", "whether the processor is back");
        }
        let _here = Placed::on(usize::from(Path::new(ONLINE).exists()))?;
        next("after it came back")?;
        let _there = Placed::on(0)?;
        next("on the first processor")?;
    }
    Ok(())
}

/// The nodes have mode 0660 and belong to whoever made the VM, and vanish with it.
fn nodes_belong_to_their_creator() -> Outcome {
    const USER: u32 = 1234;
    let system = System::open()?;
    // SAFETY: changes as whom this thread creates files.
    unsafe { libc::setfsgid(USER) };
    // SAFETY: as above.
    unsafe { libc::setfsuid(USER) };
    let id = system.create_vm_id();
    let mut paths = Vec::new();
    let made = id.map_err(anyhow::Error::from).and_then(|id| {
        let vm = Vm::open(id)?;
        vm.create_vcpu_only(3)?;
        paths = vec![Vm::path(id), crate::client::Vcpu::path(id, 3)];
        Ok(vm)
    });
    // SAFETY: root again.
    unsafe { libc::setfsuid(0) };
    // SAFETY: as above.
    unsafe { libc::setfsgid(0) };
    let vm = made?;
    for path in &paths {
        let Ok(node) = fs::metadata(path) else {
            bail!("{path} is not there");
        };
        same!(node.mode() & 0o7777, 0o660, "mode of {path}");
        same!((node.uid(), node.gid()), (USER, USER), "owner of {path}");
    }
    drop(vm);
    for path in &paths {
        ensure!(!Path::new(path).exists(), "{path} is still there");
    }
    Ok(())
}

/// The client's thread has the guest's registers in its processor during RUN, and its own again after it,
/// upper halves included. Libraries would not notice: a call may lose them.
fn the_client_keeps_its_vector_registers() -> Outcome {
    ensure!(
        std::is_x86_feature_detected!("avx"),
        "this case wants a processor with AVX"
    );
    let machine = Machine::new(
        Mode::Long,
        guest!(64:
            "mov rax, cr4", "bts rax, 18", "mov cr4, rax",
            "xor ecx, ecx", "xor edx, edx", "mov eax, 7", "xsetbv",
            "2: mov eax, 0x77777777", "vmovd xmm0, eax", "vbroadcastss ymm5, [rip + 3f]",
            "vmovaps ymm12, ymm5", "hlt", "jmp 2b", "3: .long 0x66666666"),
    )?;
    // The first RUN may end before the guest has written them.
    same!(machine.run()?, Exit::Halt, "the guest's first end");
    let mut mine = [0_u8; 64];
    for (byte, value) in mine.iter_mut().zip(0xa0..) {
        *byte = value;
    }
    let mut after = [0_u8; 64];
    let result: i64;
    // SAFETY: the system call ioctl (16) with RUN and no argument; it writes no memory of this program but
    // the tunnel's, which is not a reference here. The two registers are declared.
    unsafe {
        core::arch::asm!(
            "vmovdqu ymm5, [{mine}]",
            "vmovdqu ymm12, [{mine} + 32]",
            "syscall",
            "vmovdqu [{after}], ymm5",
            "vmovdqu [{after} + 32], ymm12",
            "vzeroupper",
            mine = in(reg) mine.as_ptr(),
            after = in(reg) after.as_mut_ptr(),
            inlateout("rax") 16_i64 => result,
            in("rdi") i64::from(machine.vcpu.node.fd()),
            in("rsi") u64::from(number::HAX_VCPU_IOCTL_RUN),
            in("rdx") 0_u64,
            out("rcx") _,
            out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
    same!(result, 0, "RUN");
    same!(after, mine, "YMM5 and YMM12 of the client");
    Ok(())
}

/// The kernel does not see the client's WRGSBASE, nor the module the guest's SWAPGS: each RUN finds the
/// client's base and puts it back, and the guest's goes with the guest.
fn the_client_keeps_its_gs_base() -> Outcome {
    const HWCAP2_FSGSBASE: u64 = 2;
    // SAFETY: asks for a number.
    let features = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    ensure!(
        features & HWCAP2_FSGSBASE != 0,
        "this case wants a processor and a kernel with FSGSBASE"
    );
    let machine = Machine::new(
        Mode::Long,
        guest!(64: "2:", "swapgs", "mov eax, gs:[0]", "out 0x80, al", "jmp 2b"),
    )?;
    machine.ram.write_u32(DATA, 0x77);
    machine.ram.write_u32(DATA + 0x1000, 0x66);
    machine.vcpu.set_msrs(&[(0xc000_0102, DATA + 0x1000)])?;
    machine.set(|state| state.gs.base = DATA)?;
    for (round, mine) in [0x1234_5000_u64, 0, DATA, 0x7fff_ffff_f000]
        .into_iter()
        .enumerate()
    {
        // SAFETY: nothing in a 64-bit Linux program uses GS; the feature is there.
        unsafe { core::arch::asm!("wrgsbase {}", in(reg) mine, options(nomem, nostack)) };
        let guests = if round % 2 == 0 { 0x66 } else { 0x77 };
        machine.expect(&[out(0x80, 1, guests)])?;
        let after: u64;
        // SAFETY: reads a register; the feature is there.
        unsafe { core::arch::asm!("rdgsbase {}", out(reg) after, options(nomem, nostack)) };
        same!(after, mine, "the client's GS base");
    }
    Ok(())
}
