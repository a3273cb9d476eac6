//! The simulated processor: seam 1. Register access here; VMX instructions in
//! `instructions`, entry and exit in `entry`.
// UNSAFETY: implements the processor seam.
#![expect(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmx::arch::addr::Hpa;
use vmx::arch::ept::{InveptKind, InvvpidKind};
use vmx::arch::msr;
use vmx::cpu::{
    Cpu, CpuidResult, GuestRegs, KernelSelectors, TableRegister, UserSelectors, VmxFailure, how,
};

use crate::cores::{Cores, thread, use_machine};
use crate::entry;
use crate::fault;
use crate::profile::{Profile, canonical_in};
use crate::state::{Inner, Processor, State};

/// The processor of a [`crate::Machine`]: whichever the calling thread is on.
#[derive(Clone)]
pub struct SimCpu {
    pub(crate) inner: Arc<Inner>,
}

impl SimCpu {
    /// Runs `f` on the state of this thread's processor.
    fn with<T>(&self, f: impl FnOnce(&Profile, &mut State, usize) -> T) -> T {
        let _inside = fault::inside();
        use_machine(&self.inner);
        let cpu = self.inner.cores.current();
        let mut state = self.inner.state();
        let counted = state.cpus[cpu].count_event(false);
        if let Some(text) = counted.finding {
            state.finding(text);
        }
        if counted.interrupt {
            self.inner.cores.raise_nmi(cpu);
        }
        f(&self.inner.profile, &mut state, cpu)
    }

    /// The same for what only makes sense on a processor the thread cannot leave.
    fn with_pinned<T>(&self, what: &str, f: impl FnOnce(&Profile, &mut State, usize) -> T) -> T {
        if !Cores::is_pinned() {
            let _inside = fault::inside();
            self.inner.finding(format!("{what} while not pinned"));
        }
        self.with(f)
    }

    fn register(&self, get: impl FnOnce(&Processor) -> u64) -> u64 {
        self.with(|_, state, cpu| get(&state.cpus[cpu]))
    }
}

const CR4_LA57: u64 = 1 << 12;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_FRED: u64 = 1 << 32;

/// Whether an MSR takes a value, SDM vol. 4 chapter 2.
pub(crate) fn msr_accepts(profile: &Profile, number: u32, value: u64) -> bool {
    match number {
        msr::IA32_EFER => value & !0xd01 == 0,
        msr::IA32_PAT => value
            .to_le_bytes()
            .iter()
            .all(|t| matches!(t, 0 | 1 | 4..=7)),
        msr::IA32_SYSENTER_ESP
        | msr::IA32_SYSENTER_EIP
        | msr::IA32_LSTAR
        | msr::IA32_CSTAR
        | msr::IA32_FS_BASE
        | msr::IA32_GS_BASE
        | msr::IA32_KERNEL_GSBASE => profile.canonical(value),
        msr::IA32_FMASK | msr::IA32_TSC_AUX => value >> 32 == 0,
        msr::IA32_DEBUGCTL => value & !0xffc3 == 0,
        msr::IA32_SPEC_CTRL => value & !7 == 0,
        msr::IA32_PRED_CMD | msr::IA32_FLUSH_CMD => value & !1 == 0,
        msr::IA32_XSS => value == 0,
        msr::IA32_FEATURE_CONTROL => profile.msr(number) & 1 == 0,
        0x480..=0x491 | 0xfe | msr::IA32_ARCH_CAPABILITIES | msr::IA32_CORE_CAPABILITIES => false,
        _ => true,
    }
}

impl Processor {
    pub(crate) fn read_msr(&self, tsc: u64, number: u32) -> Option<u64> {
        match number {
            msr::IA32_TSC => Some(tsc),
            msr::IA32_PRED_CMD | msr::IA32_FLUSH_CMD => None,
            _ => self.msrs.get(&number).copied(),
        }
    }

    pub(crate) fn write_msr(&mut self, profile: &Profile, number: u32, value: u64) -> bool {
        if !self.msrs.contains_key(&number) {
            return false;
        }
        if let Some(done) = self.write_counter_msr(number, value, profile.keeps_counts) {
            return done;
        }
        let Some(slot) = self.msrs.get_mut(&number) else {
            return false;
        };
        if number == msr::IA32_FEATURE_CONTROL && *slot & 1 != 0 {
            return false;
        }
        if !msr_accepts(profile, number, value) {
            return false;
        }
        // LME cannot change while paging is on; LMA is not software's.
        if number == msr::IA32_EFER {
            if (*slot ^ value) & 0x100 != 0 && self.cr0 >> 31 & 1 != 0 {
                return false;
            }
            *slot = (value & !0x400) | (*slot & 0x400);
            return true;
        }
        *slot = value;
        if number == msr::IA32_PRED_CMD {
            self.predictor.forget();
        }
        if number == msr::IA32_SPEC_CTRL {
            self.predictor.write_ibrs();
        }
        true
    }
}

impl Cpu for SimCpu {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        self.with(|profile, state, cpu| {
            state.counts.cpuid += 1;
            let p = &state.cpus[cpu];
            let number = u32::try_from(cpu).unwrap_or(0);
            profile.cpuid_answer(leaf, subleaf, p.cr4 >> 18 & 1 != 0, number, p.xcr0)
        })
    }

    unsafe fn rdmsr(&self, number: u32) -> u64 {
        self.with(|_, state, cpu| {
            state.counts.rdmsr += 1;
            state.tsc += 20;
            let tsc = state.tsc;
            match state.cpus[cpu].read_msr(tsc, number) {
                Some(value) => value,
                None => {
                    state.finding(format!("host #GP: RDMSR {number:#x}"));
                    0
                }
            }
        })
    }

    unsafe fn wrmsr(&self, number: u32, value: u64) {
        self.with_pinned("WRMSR", |profile, state, cpu| {
            state.counts.wrmsr += 1;
            state.counts.forgot_branches += u64::from(number == msr::IA32_PRED_CMD);
            if !state.cpus[cpu].write_msr(profile, number, value) {
                state.finding(format!("host #GP: WRMSR {number:#x} = {value:#x}"));
            }
        });
    }

    unsafe fn fs_base(&self) -> u64 {
        self.with(|_, state, cpu| {
            let p = &state.cpus[cpu];
            let base = p.msrs.get(&msr::IA32_FS_BASE).copied().unwrap_or(0);
            if p.cr4 & CR4_FSGSBASE == 0 {
                state.finding("host #UD: RDFSBASE without CR4.FSGSBASE");
            }
            base
        })
    }

    unsafe fn exchange_kernel_gs_base(&self, value: u64) -> u64 {
        if thread(|t| t.masked.get() == 0) {
            let _inside = fault::inside();
            self.inner.finding("SWAPGS with interrupts on");
        }
        let tolerated = self.inner.tolerates_gs.load(Ordering::SeqCst);
        self.with_pinned("SWAPGS", |_, state, cpu| {
            state.counts.swapgs += 1;
            let cr4 = state.cpus[cpu].cr4;
            if !tolerated {
                state.finding("SWAPGS on a host whose NMI handler would not survive it");
            }
            if cr4 & CR4_FRED != 0 {
                state.finding("host #UD: SWAPGS with CR4.FRED");
            }
            if cr4 & CR4_FSGSBASE == 0 {
                state.finding("host #UD: WRGSBASE without CR4.FSGSBASE");
            }
            // What it takes depends on the paging mode, not on the processor.
            let bits = if cr4 & CR4_LA57 != 0 { 57 } else { 48 };
            if !canonical_in(bits, value) {
                state.finding(format!("host #GP: WRGSBASE of {value:#x}"));
                return 0;
            }
            let msrs = &mut state.cpus[cpu].msrs;
            msrs.insert(msr::IA32_KERNEL_GSBASE, value).unwrap_or(0)
        })
    }

    fn cr0(&self) -> u64 {
        self.register(|p| p.cr0)
    }

    fn cr2(&self) -> u64 {
        self.register(|p| p.cr2)
    }

    fn cr3(&self) -> u64 {
        self.register(|p| p.cr3)
    }

    fn cr4(&self) -> u64 {
        self.register(|p| p.cr4)
    }

    unsafe fn set_cr2(&self, value: u64) {
        if thread(|t| t.masked.get() == 0) {
            let _inside = fault::inside();
            self.inner.finding("MOV to CR2 with interrupts on");
        }
        self.with_pinned("MOV to CR2", |_, state, cpu| state.cpus[cpu].cr2 = value);
    }

    fn dr(&self, index: u8) -> u64 {
        self.register(|p| p.dr[usize::from(index & 7)])
    }

    unsafe fn set_dr(&self, index: u8, value: u64) {
        self.with_pinned("MOV to DR", |_, state, cpu| {
            // SDM 18.2 "Debug Registers": the upper halves of DR6 and DR7 must be 0.
            if index >= 6 && value >> 32 != 0 {
                state.finding(format!("host #GP: MOV DR{index} = {value:#x}"));
                return;
            }
            let fixed = match index {
                6 => (value & 0x1_e00f) | 0xfffe_0ff0,
                7 => (value & 0xffff_2bff) | 0x400,
                _ => value,
            };
            state.cpus[cpu].dr[usize::from(index & 7)] = fixed;
        });
    }

    fn rdtsc(&self) -> u64 {
        self.with(|_, state, _| {
            state.tsc += 20;
            state.tsc
        })
    }

    fn gdtr(&self) -> TableRegister {
        self.with(|_, state, cpu| state.cpus[cpu].gdtr)
    }

    fn idtr(&self) -> TableRegister {
        self.with(|_, state, cpu| state.cpus[cpu].idtr)
    }

    fn kernel_selectors(&self) -> KernelSelectors {
        self.with(|_, state, cpu| state.cpus[cpu].kernel_selectors)
    }

    fn user_selectors(&self) -> UserSelectors {
        self.with(|_, state, cpu| state.cpus[cpu].user_selectors)
    }

    unsafe fn restore_segmentation(&self, gdtr: TableRegister, selectors: &UserSelectors) {
        if thread(|t| t.masked.get() == 0) {
            let _inside = fault::inside();
            self.inner
                .finding("segmentation restored with interrupts on");
        }
        self.with_pinned("LGDT", |_, state, cpu| {
            let p = &mut state.cpus[cpu];
            p.gdtr = gdtr;
            p.user_selectors.ldtr = selectors.ldtr;
            p.user_selectors.ds = selectors.ds;
            p.user_selectors.es = selectors.es;
            // Loading a selector loads the descriptor's base too.
            if selectors.fs != 0 {
                p.user_selectors.fs = selectors.fs;
                p.msrs.insert(msr::IA32_FS_BASE, 0xf5);
            }
            let undefined = selectors.gs != 0 && p.cr4 & CR4_FRED != 0;
            if selectors.gs != 0 {
                p.user_selectors.gs = selectors.gs;
                p.msrs.insert(msr::IA32_KERNEL_GSBASE, 0x65);
            }
            if undefined {
                state.finding("host #UD: SWAPGS with CR4.FRED");
            }
        });
    }

    fn tr_base(&self) -> u64 {
        self.register(|p| p.tr_base)
    }

    unsafe fn xcr0(&self) -> u64 {
        self.with(|_, state, cpu| {
            if state.cpus[cpu].cr4 >> 18 & 1 == 0 {
                state.finding("host #UD: XGETBV without CR4.OSXSAVE");
            }
            state.cpus[cpu].xcr0
        })
    }

    unsafe fn set_xcr0(&self, value: u64) {
        self.with_pinned("XSETBV", |profile, state, cpu| {
            state.counts.xsetbv += 1;
            let avx512 = value & 0xe0;
            let bad = value & 1 == 0
                || value & 4 != 0 && value & 2 == 0
                || avx512 != 0 && (avx512 != 0xe0 || value & 4 == 0)
                || value & !profile.xcr0_supported != 0;
            if state.cpus[cpu].cr4 >> 18 & 1 == 0 {
                state.finding("host #UD: XSETBV without CR4.OSXSAVE");
            } else if bad {
                state.finding(format!("host #GP: XSETBV of XCR0 = {value:#x}"));
            } else {
                state.cpus[cpu].xcr0 = value;
            }
        });
    }

    unsafe fn xsave(&self, area: *mut u8, mask: u64) {
        self.with_pinned("XSAVE", |profile, state, cpu| {
            state.counts.xsave += 1;
            state.check_area(cpu, area.cast_const());
            let p = &state.cpus[cpu];
            if mask != 0 && p.cr4 >> 18 & 1 == 0 {
                state.finding("XSAVE without CR4.OSXSAVE");
                return;
            }
            if mask != 0 {
                // SAFETY: the caller gives an area of the right size.
                unsafe { p.extended.xsave(profile, area, mask, p.xcr0) };
            } else {
                // SAFETY: the caller gives 512 bytes.
                unsafe { p.extended.fxsave(area) };
            }
        });
    }

    unsafe fn xrstor(&self, area: *const u8, mask: u64) {
        self.with_pinned("XRSTOR", |profile, state, cpu| {
            state.counts.xrstor += 1;
            state.check_area(cpu, area);
            let p = &mut state.cpus[cpu];
            if p.host_extended.is_none() {
                state.finding("XRSTOR outside fpu_begin and fpu_end");
                return;
            }
            if mask != 0 && p.cr4 >> 18 & 1 == 0 {
                state.finding("XRSTOR without CR4.OSXSAVE");
                return;
            }
            if mask != 0 {
                let xcr0 = p.xcr0;
                // SAFETY: the caller gives an area of the right size.
                let result = unsafe { p.extended.xrstor(profile, area, mask, xcr0) };
                if let Err(why) = result {
                    state.finding(format!("host #GP: {why}"));
                }
            } else {
                // SAFETY: the caller gives 512 bytes.
                let fine = unsafe { p.extended.fxrstor(area) };
                if !fine {
                    state.finding("host #GP: FXRSTOR with reserved bits of MXCSR");
                }
            }
        });
    }

    unsafe fn raise_nmi(&self) {
        self.with_pinned("INT 2", |_, state, cpu| {
            state.counts.raise_nmi += 1;
            if state.cpus[cpu].cr4 & CR4_FRED != 0 {
                state.finding("INT 2 with CR4.FRED: the host takes it for a software interrupt");
            }
            // Its handler takes every counter for the host's, and PEBS to be as the host left it.
            let [left, now] = state.cpus[cpu].pebs();
            if left != now {
                state.finding(format!(
                    "the host's NMI handler finds PEBS {now:#x} instead of {left:#x}"
                ));
            }
            if let Some(n) = state.cpus[cpu].lent_counter() {
                state.finding(format!(
                    "the host's NMI handler meets a guest's counter {n}"
                ));
            }
        });
    }

    unsafe fn raise_machine_check(&self) {
        self.with_pinned("INT 18", |_, state, _| {
            state.counts.raise_machine_check += 1;
        });
    }

    unsafe fn vmxon(&self, region: Hpa) -> Result<(), VmxFailure> {
        self.with_pinned("VMXON", |profile, state, cpu| {
            state.vmxon(profile, cpu, region.0)
        })
    }

    unsafe fn vmxoff(&self) -> Result<(), VmxFailure> {
        self.with_pinned("VMXOFF", |_, state, cpu| state.vmxoff(cpu))
    }

    unsafe fn vmclear(&self, vmcs: Hpa) -> Result<(), VmxFailure> {
        self.with_pinned("VMCLEAR", |profile, state, cpu| {
            state.vmclear(profile, cpu, vmcs.0)
        })
    }

    unsafe fn vmptrld(&self, vmcs: Hpa) -> Result<(), VmxFailure> {
        self.with_pinned("VMPTRLD", |profile, state, cpu| {
            state.vmptrld(profile, cpu, vmcs.0)
        })
    }

    unsafe fn vmptrst(&self) -> Option<Hpa> {
        self.with_pinned("VMPTRST", |_, state, cpu| state.vmptrst(cpu))
            .map(Hpa)
    }

    unsafe fn vmread(&self, field: u32) -> Result<u64, VmxFailure> {
        self.with_pinned("VMREAD", |profile, state, cpu| {
            state.vmread(profile, cpu, field)
        })
    }

    unsafe fn vmwrite(&self, field: u32, value: u64) -> Result<(), VmxFailure> {
        self.with_pinned("VMWRITE", |profile, state, cpu| {
            state.vmwrite(profile, cpu, field, value)
        })
    }

    unsafe fn invept(&self, kind: InveptKind, eptp: u64) -> Result<(), VmxFailure> {
        self.with_pinned("INVEPT", |profile, state, cpu| {
            state.invept(profile, cpu, kind as u64, eptp)
        })
    }

    unsafe fn invvpid(&self, kind: InvvpidKind, vpid: u16, address: u64) -> Result<(), VmxFailure> {
        self.with_pinned("INVVPID", |profile, state, cpu| {
            state.invvpid(profile, cpu, kind as u64, vpid, address)
        })
    }

    unsafe fn enter(&self, regs: &mut GuestRegs) -> Result<(), VmxFailure> {
        let _inside = fault::inside();
        use_machine(&self.inner);
        if thread(|t| t.masked.get() == 0) {
            self.inner.finding("VM entry with interrupts on");
        }
        let cpu = self.inner.cores.current();
        let how = regs.how;
        let launched = how & how::LAUNCHED != 0;
        let plain = how == how::LAUNCHED;
        {
            let mut state = self.inner.state();
            state.counts.plain_entries += u64::from(plain);
            state.counts.cleared_buffers += u64::from(how & how::CLEAR_BUFFERS != 0);
            state.counts.filled_returns += u64::from(how & how::FILL_RETURNS != 0);
            if how & how::FLUSH_L1D != 0 && regs.on_loan == 1 {
                regs.on_loan = 2;
                state.counts.flushed_l1d += 1;
            }
        }
        if how & how::SPEC_CTRL != 0 {
            // SAFETY: the caller says that the register exists.
            regs.host_spec_ctrl = unsafe { self.rdmsr(msr::IA32_SPEC_CTRL) };
            // SAFETY: and that it takes the value.
            unsafe { self.wrmsr(msr::IA32_SPEC_CTRL, regs.spec_ctrl) };
        }
        regs.how = (how | how::LAUNCHED) & !how::CHANGED;
        let result = entry::enter(&self.inner, cpu, regs, launched);
        if how & how::SPEC_CTRL != 0 {
            // SAFETY: as above.
            regs.spec_ctrl = unsafe { self.rdmsr(msr::IA32_SPEC_CTRL) };
            // SAFETY: the host's own value.
            unsafe { self.wrmsr(msr::IA32_SPEC_CTRL, regs.host_spec_ctrl) };
        }
        if self.inner.wanted() != vmx::host::Mitigations::Off {
            self.inner.state().rely_on_ibrs(cpu);
        }
        result
    }
}

impl State {
    fn check_area(&mut self, cpu: usize, area: *const u8) {
        let align = if self.cpus[cpu].cr4 >> 18 & 1 != 0 {
            64
        } else {
            16
        };
        if area.addr() % align != 0 {
            self.finding("host #GP: XSAVE area not aligned");
        }
    }
}
