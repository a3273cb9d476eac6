//! Runs one instruction on the processor this test runs on, with chosen
//! registers, and brings back what became of them.
//!
//! A signal handler does it: a first signal swaps the thread's saved context for
//! the case's, with RFLAGS.TF set, so that the kernel "returns" into the
//! instruction; the trap or fault that ends it raises another signal, whose
//! handler keeps the result and swaps the old context back. The context's CS
//! chooses 16-, 32- or 64-bit code.
//
// UNSAFETY: signal handlers, fixed mappings and segment registers exist only as
// calls into the system.
#![allow(unsafe_code, dead_code, unreachable_pub, missing_docs)]

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Where the instruction lies, and three pages of data: two writable, one
/// read-only, with nothing mapped before and after.
pub const CODE: u64 = 0x1000_0000;
pub const DATA: u64 = 0x2000_0000;
pub const DATA_PAGES: u64 = 3;
/// Offset of the instruction in the code page.
pub const START: u64 = 0x800;

/// More steps than any repeated instruction of the tests needs.
const MAX_STEPS: u32 = 200;

const TRAP: i64 = 1 << 8;

/// Registers in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub vectors: [[u8; 64]; 32],
    pub opmasks: [u64; 8],
    pub mxcsr: u32,
    /// With the x87 status word's TOP 0, as it is before and after.
    pub mmx: [u64; 8],
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    pub registers: Registers,
    /// 1 if it completed.
    pub vector: u64,
    pub error_code: u64,
    pub cr2: u64,
}

/// The segments a case runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selectors {
    pub cs: u16,
    pub ss: u16,
    /// DS and ES.
    pub data: u16,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    Armed,
    Running,
}

struct Shared {
    stage: Stage,
    case: Registers,
    selectors: Selectors,
    outcome: Outcome,
    saved: libc::mcontext_t,
    saved_fp: [u8; FP_LEN],
    wide: Option<Wide>,
    steps: u32,
    /// Step until RIP leaves this, if the instruction repeats.
    start: Option<i64>,
}

impl Registers {
    pub const ZERO: Self = Self {
        gpr: [0; 16],
        rip: 0,
        rflags: 0,
        vectors: [[0; 64]; 32],
        opmasks: [0; 8],
        mxcsr: 0,
        mmx: [0; 8],
    };
}

/// The XSAVE area in the standard format: SDM 1 13.4.1 "Legacy Region of an XSAVE
/// Area", 13.4.2, 13.5 "XSAVE-Managed State".
const FP_LEN: usize = 4096;
const FSW: usize = 2;
const FTW: usize = 4;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
/// Length of the area, in the bytes that are software's.
const LENGTH: usize = 464 + 16;
const XSTATE_BV: usize = 512;
const YMM_HIGH: usize = 576;

/// Where opmask, ZMM_Hi256 and Hi16_ZMM are: CPUID leaf 0DH.
#[derive(Clone, Copy)]
struct Wide {
    opmask: usize,
    zmm_high: usize,
    hi16: usize,
}

fn wide() -> Option<Wide> {
    let offset = |component| std::arch::x86_64::__cpuid_count(0xd, component).ebx as usize;
    let present = std::is_x86_feature_detected!("avx512f");
    present.then(|| Wide {
        opmask: offset(5),
        zmm_high: offset(6),
        hi16: offset(7),
    })
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(ptr::null_mut());

/// gregs' indices, in the order of the registers' numbers.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

fn word(area: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(area[at..][..8].try_into().expect("8 bytes"))
}

/// A clear bit in XSTATE_BV means that the component is in its initial state, all
/// zeros.
fn load_vectors(area: &[u8], wide: Option<Wide>, out: &mut Registers) {
    let present = area[XSTATE_BV];
    out.mxcsr = word(area, MXCSR) as u32;
    for i in 0..16 {
        let vector = &mut out.vectors[i];
        if present & 2 != 0 {
            vector[..16].copy_from_slice(&area[XMM + 16 * i..][..16]);
        }
        if present & 4 != 0 {
            vector[16..32].copy_from_slice(&area[YMM_HIGH + 16 * i..][..16]);
        }
    }
    if present & 1 != 0 {
        for i in 0..8 {
            out.mmx[i] = word(area, ST + 16 * i);
        }
    }
    let Some(wide) = wide else { return };
    if present & 1 << 5 != 0 {
        for i in 0..8 {
            out.opmasks[i] = word(area, wide.opmask + 8 * i);
        }
    }
    for i in 0..16 {
        if present & 1 << 6 != 0 {
            out.vectors[i][32..].copy_from_slice(&area[wide.zmm_high + 32 * i..][..32]);
        }
        if present & 1 << 7 != 0 {
            out.vectors[16 + i].copy_from_slice(&area[wide.hi16 + 64 * i..][..64]);
        }
    }
}

fn store_vectors(area: &mut [u8], wide: Option<Wide>, from: &Registers) {
    area[XSTATE_BV] |= 7;
    area[FSW..FSW + 2].copy_from_slice(&[0, 0]);
    area[FTW] = 0xff;
    area[MXCSR..][..4].copy_from_slice(&from.mxcsr.to_le_bytes());
    for i in 0..8 {
        area[ST + 16 * i..][..8].copy_from_slice(&from.mmx[i].to_le_bytes());
    }
    for i in 0..16 {
        area[XMM + 16 * i..][..16].copy_from_slice(&from.vectors[i][..16]);
        area[YMM_HIGH + 16 * i..][..16].copy_from_slice(&from.vectors[i][16..32]);
    }
    let Some(wide) = wide else { return };
    area[XSTATE_BV] |= 0xe0;
    for i in 0..8 {
        area[wide.opmask + 8 * i..][..8].copy_from_slice(&from.opmasks[i].to_le_bytes());
    }
    for i in 0..16 {
        area[wide.zmm_high + 32 * i..][..32].copy_from_slice(&from.vectors[i][32..]);
        area[wide.hi16 + 64 * i..][..64].copy_from_slice(&from.vectors[16 + i]);
    }
}

extern "C" fn handler(signal: i32, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: set before any handler is installed, and used by one thread, which
    // waits for the handler.
    let shared = unsafe { &mut *SHARED.load(Ordering::SeqCst) };
    // SAFETY: with SA_SIGINFO the third argument is the interrupted context.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let area = context.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: the kernel saved an XSAVE area there; its first 512 bytes tell how
    // long it is (the kernel's struct _fpx_sw_bytes, extended_size).
    let length = unsafe { area.wrapping_add(LENGTH).cast::<u32>().read_unaligned() } as usize;
    // SAFETY: as long as the kernel says; the processor has AVX, which `Host::new`
    // checked, so it is more than the legacy region.
    let area = unsafe { std::slice::from_raw_parts_mut(area, length.min(FP_LEN)) };
    let machine = &mut context.uc_mcontext;
    match shared.stage {
        Stage::Armed => {
            shared.saved = *machine;
            shared.saved_fp[..area.len()].copy_from_slice(area);
            for (index, value) in GREGS.iter().zip(shared.case.gpr) {
                machine.gregs[*index as usize] = value as i64;
            }
            machine.gregs[libc::REG_RIP as usize] = shared.case.rip as i64;
            machine.gregs[libc::REG_EFL as usize] = shared.case.rflags as i64 | TRAP;
            let old = machine.gregs[libc::REG_CSGSFS as usize] as u64;
            machine.gregs[libc::REG_CSGSFS as usize] = (old & 0x0000_ffff_ffff_0000
                | u64::from(shared.selectors.cs)
                | u64::from(shared.selectors.ss) << 48)
                as i64;
            store_vectors(area, shared.wide, &shared.case);
            shared.steps = 0;
            shared.stage = Stage::Running;
        }
        Stage::Running => {
            shared.steps += 1;
            let trapped = signal == libc::SIGTRAP;
            let still_there = shared.start == Some(machine.gregs[libc::REG_RIP as usize]);
            if trapped && still_there && shared.steps < MAX_STEPS {
                return;
            }
            let mut gpr = [0; 16];
            for (to, index) in gpr.iter_mut().zip(GREGS) {
                *to = machine.gregs[index as usize] as u64;
            }
            let mut registers = Registers {
                gpr,
                rip: machine.gregs[libc::REG_RIP as usize] as u64,
                rflags: machine.gregs[libc::REG_EFL as usize] as u64,
                ..Registers::ZERO
            };
            load_vectors(area, shared.wide, &mut registers);
            shared.outcome = Outcome {
                registers,
                vector: machine.gregs[libc::REG_TRAPNO as usize] as u64,
                error_code: machine.gregs[libc::REG_ERR as usize] as u64,
                cr2: machine.gregs[libc::REG_CR2 as usize] as u64,
            };
            let fpregs = machine.fpregs;
            *machine = shared.saved;
            machine.fpregs = fpregs;
            area.copy_from_slice(&shared.saved_fp[..area.len()]);
            shared.stage = Stage::Idle;
        }
        Stage::Idle => {
            // A real crash of the test: let it happen again without us.
            // SAFETY: restoring the default action has no other effect.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

fn map(address: u64, len: u64, protection: i32) -> *mut u8 {
    // SAFETY: a fixed mapping that replaces nothing: it fails where something
    // is mapped already.
    let found = unsafe {
        libc::mmap(
            address as *mut c_void,
            len as usize,
            protection,
            libc::MAP_PRIVATE
                | libc::MAP_ANONYMOUS
                | libc::MAP_FIXED_NOREPLACE
                | libc::MAP_POPULATE,
            -1,
            0,
        )
    };
    assert_eq!(found as u64, address, "cannot map {address:#x}");
    found.cast()
}

fn protect(address: u64, len: u64, protection: i32) {
    // SAFETY: the range is a mapping of this file's that holds no Rust object.
    let result = unsafe { libc::mprotect(address as *mut c_void, len as usize, protection) };
    assert_eq!(result, 0);
}

/// The processor. One at a time: signal handlers belong to the process.
pub struct Host {
    code: *mut u8,
    data: *mut u8,
    alternate_stack: Vec<u8>,
}

impl Host {
    /// `None` if the processor has no AVX.
    pub fn new() -> Option<Self> {
        if !std::is_x86_feature_detected!("avx2") {
            return None;
        }
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        let code = map(CODE, 4096, writable | libc::PROT_EXEC);
        let data = map(DATA, DATA_PAGES * 4096, writable);
        protect(DATA + (DATA_PAGES - 1) * 4096, 4096, libc::PROT_READ);
        // SAFETY: a structure of numbers and null pointers.
        let saved: libc::mcontext_t = unsafe { std::mem::zeroed() };
        let shared = Box::leak(Box::new(Shared {
            stage: Stage::Idle,
            case: Registers::ZERO,
            selectors: Selectors {
                cs: 0x33,
                ss: 0x2b,
                data: 0,
            },
            outcome: Outcome {
                registers: Registers::ZERO,
                vector: 0,
                error_code: 0,
                cr2: 0,
            },
            saved,
            saved_fp: [0; FP_LEN],
            wide: wide(),
            steps: 0,
            start: None,
        }));
        SHARED.store(shared, Ordering::SeqCst);
        let mut host = Self {
            code,
            data,
            alternate_stack: vec![0; 1 << 17],
        };
        host.install();
        Some(host)
    }

    fn install(&mut self) {
        let stack = libc::stack_t {
            ss_sp: self.alternate_stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: self.alternate_stack.len(),
        };
        // SAFETY: the buffer lives as long as `self`, which outlives the cases.
        let result = unsafe { libc::sigaltstack(&stack, ptr::null_mut()) };
        assert_eq!(result, 0);
        // SAFETY: a structure of numbers and null pointers.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in [
            libc::SIGUSR1,
            libc::SIGTRAP,
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
        ] {
            // SAFETY: the handler is async-signal-safe: it copies memory.
            let result = unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
            assert_eq!(result, 0);
        }
    }

    /// Puts an instruction at [`CODE`] + [`START`].
    pub fn set_code(&mut self, bytes: &[u8]) {
        // SAFETY: an instruction has 15 bytes at most and lies inside the page.
        unsafe {
            ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.code.wrapping_add(START as usize),
                bytes.len().min(15),
            );
        };
    }

    /// Fills page `page` of the data.
    pub fn set_data(&mut self, page: u64, bytes: &[u8]) {
        let address = DATA + page * 4096;
        let last = page == DATA_PAGES - 1;
        if last {
            protect(address, 4096, libc::PROT_READ | libc::PROT_WRITE);
        }
        let to = self.data.wrapping_add((page * 4096) as usize);
        assert_eq!(bytes.len(), 4096);
        // SAFETY: a whole page of this mapping, writable now.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, 4096) };
        if last {
            protect(address, 4096, libc::PROT_READ);
        }
    }

    /// A copy of page `page` of the data.
    pub fn data(&self, page: u64) -> Vec<u8> {
        let from = self.data.wrapping_add((page * 4096) as usize);
        // SAFETY: a whole page of this mapping; nothing writes it now.
        unsafe { std::slice::from_raw_parts(from, 4096) }.to_vec()
    }

    /// Makes an entry of the local descriptor table: `user_desc` of the kernel's
    /// interface. Returns its selector, or `None` if this kernel has no such table.
    pub fn set_descriptor(&mut self, entry: u32, base: u32, limit: u32, flags: u32) -> Option<u16> {
        let descriptor = [entry, base, limit, flags];
        // SAFETY: function 1 reads a structure of 16 bytes.
        let result = unsafe { libc::syscall(libc::SYS_modify_ldt, 1, &descriptor, 16) };
        (result == 0).then_some((entry << 3 | 7) as u16)
    }

    /// The FS base, which is the thread's and must stay.
    pub fn fs_base(&self) -> u64 {
        let mut base = 0u64;
        // SAFETY: ARCH_GET_FS (0x1003) writes the base to the pointer.
        unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1003, &mut base) };
        base
    }

    /// Sets the GS base, which no Rust code uses.
    pub fn set_gs_base(&mut self, base: u64) {
        // SAFETY: ARCH_SET_GS (0x1001) changes nothing a program here relies on.
        unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1001, base) };
    }

    fn set_data_selectors(&mut self, selector: u16) {
        // mov eax, edi; mov ds, eax; mov es, eax; ret
        self.set_code(&[0x89, 0xf8, 0x8e, 0xd8, 0x8e, 0xc0, 0xc3]);
        let entry = self.code.wrapping_add(START as usize);
        // SAFETY: the bytes just written are a C function of this type; in
        // 64-bit mode DS and ES mean nothing, so any valid selector does.
        let load: extern "C" fn(u32) = unsafe { std::mem::transmute(entry) };
        load(u32::from(selector));
    }

    /// Runs the instruction in `bytes` from `case`: one step, or with `repeats`
    /// until RIP leaves it or it faults.
    pub fn run(
        &mut self,
        bytes: &[u8],
        case: &Registers,
        selectors: Selectors,
        repeats: bool,
    ) -> Outcome {
        let shared = SHARED.load(Ordering::SeqCst);
        // SAFETY: no handler runs now.
        let before = unsafe { (*shared).selectors };
        if before.data != selectors.data {
            self.set_data_selectors(selectors.data);
        }
        self.set_code(bytes);
        // SAFETY: no handler runs now.
        let state = unsafe { &mut *shared };
        state.case = *case;
        state.selectors = selectors;
        state.start = repeats.then_some(case.rip as i64);
        state.stage = Stage::Armed;
        // SAFETY: raises a signal whose handler is installed.
        unsafe { libc::raise(libc::SIGUSR1) };
        // SAFETY: the case is over, no handler runs now.
        let state = unsafe { &*shared };
        assert!(state.stage == Stage::Idle, "the case did not run");
        state.outcome
    }
}
