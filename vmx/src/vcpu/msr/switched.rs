//! MSRs that neither VM entry nor VM exit switches: SYSCALL's, SWAPGS's, TSC_AUX.
//!
//! By hand rather than by MSR lists: only those that differ are written, and
//! SYSCALL's only for a guest that can use them. KERNEL_GS_BASE is exchanged each
//! time: user space and guest change it by SWAPGS, and neither has a copy to trust.
// UNSAFETY: WRMSR of registers that exist, host values put back by `restore`.
#![expect(unsafe_code)]

use crate::arch::msr;
use crate::arch::reg::Cr4;
use crate::cpu::Cpu;
use crate::host::Host;

/// The registers, in the order of the arrays below. KERNEL_GS_BASE comes
/// first: SWAPGS changes it without an exit.
const REGISTERS: [u32; 6] = [
    msr::IA32_KERNEL_GSBASE,
    msr::IA32_STAR,
    msr::IA32_LSTAR,
    msr::IA32_CSTAR,
    msr::IA32_FMASK,
    msr::IA32_TSC_AUX,
];
const KERNEL_GS_BASE: usize = 0;
/// SYSCALL's.
const SYSCALLS: core::ops::Range<usize> = 1..5;
const TSC_AUX: usize = 5;

/// Values of [`REGISTERS`] for guest and host.
#[derive(Default)]
pub struct SwitchedMsrs {
    guest: [u64; 6],
    host: [u64; 6],
    /// Host values of the others are known: they are fixed per processor, but
    /// for [`Host::has_foreign_msrs`].
    host_known: bool,
    /// SYSCALL's registers are the guest's now.
    syscall: bool,
    /// RDTSCP and with it TSC_AUX exist here.
    has_tsc_aux: bool,
    /// The host lets us exchange KERNEL_GS_BASE by SWAPGS.
    may_exchange: bool,
    /// That can be done on this processor.
    exchanges: bool,
}

fn write(cpu: &impl Cpu, index: usize, value: u64) {
    if let Some(register) = REGISTERS.get(index) {
        // SAFETY: the registers exist in 64-bit mode (TSC_AUX: checked); guest
        // values were checked when they were set; the host's are its own.
        unsafe { cpu.wrmsr(*register, value) };
    }
}

fn read(cpu: &impl Cpu, index: usize) -> u64 {
    REGISTERS.get(index).map_or(0, |register| {
        // SAFETY: as in `write`.
        unsafe { cpu.rdmsr(*register) }
    })
}

/// [`Cpu::exchange_kernel_gs_base`] is there for all values that the register can
/// hold: where the processor knows addresses of 57 bits WRMSR takes them even while
/// CR4.LA57 is clear, WRGSBASE does not.
fn can_exchange(cpu: &impl Cpu) -> bool {
    // SDM vol. 2, CPUID leaf 80000008H: EAX[15:8] are the bits of a linear address.
    let bits = cpu.cpuid(0x8000_0008, 0).eax >> 8 & 0xff;
    let cr4 = Cr4::from_bits_retain(cpu.cr4());
    cr4.contains(Cr4::FSGSBASE) && (bits <= 48 || cr4.contains(Cr4::LA57))
}

/// Puts `new` into KERNEL_GS_BASE; returns what was there. Interrupts are off.
#[inline]
fn exchange(cpu: &impl Cpu, by_swapgs: bool, new: u64) -> u64 {
    if by_swapgs {
        // SAFETY: `can_exchange`, and the host tolerates it; the value was in this
        // register, or was checked when it was set. `restore` puts the host's back.
        return unsafe { cpu.exchange_kernel_gs_base(new) };
    }
    let old = read(cpu, KERNEL_GS_BASE);
    if old != new {
        write(cpu, KERNEL_GS_BASE, new);
    }
    old
}

impl SwitchedMsrs {
    /// All zero, as after reset.
    pub fn new(host: &impl Host) -> Self {
        Self {
            // SDM vol. 4, table 2-2: TSC_AUX goes with RDTSCP.
            has_tsc_aux: host.cpu().cpuid(0x8000_0001, 0).edx & (1 << 27) != 0,
            may_exchange: host.tolerates_gs(),
            ..Self::default()
        }
    }

    fn place(register: u32) -> Option<usize> {
        REGISTERS.iter().position(|r| *r == register)
    }

    /// The guest's value; `None` if the register is not one of these. KERNEL_GS_BASE, which
    /// changes without an exit, is that of the end of the last loan: during one nobody
    /// asks, as the guest reads it without an exit too.
    pub fn get(&self, register: u32) -> Option<u64> {
        let place = Self::place(register)?;
        self.guest.get(place).copied()
    }

    /// Sets the guest's value; `false` if the register is not one of these.
    /// The caller has checked the value.
    pub fn set(&mut self, register: u32, value: u64) -> bool {
        let slot = Self::place(register).and_then(|place| self.guest.get_mut(place));
        match slot {
            Some(slot) => {
                *slot = value;
                true
            }
            None => false,
        }
    }

    /// The VMCS came to another processor: its host values are not known.
    pub fn moved(&mut self) {
        self.host_known = false;
    }

    fn uses(&self, index: usize) -> bool {
        match index {
            KERNEL_GS_BASE => true,
            TSC_AUX => self.has_tsc_aux,
            _ => self.syscall,
        }
    }

    #[inline]
    fn differs(&self, index: usize) -> bool {
        self.guest.get(index) != self.host.get(index)
    }

    #[inline]
    fn put_guest(&self, cpu: &impl Cpu, index: usize) {
        if self.differs(index) {
            write(cpu, index, self.guest.get(index).copied().unwrap_or(0));
        }
    }

    #[inline]
    fn put_host(&self, cpu: &impl Cpu, index: usize) {
        if self.differs(index) {
            write(cpu, index, self.host.get(index).copied().unwrap_or(0));
        }
    }

    /// Gives the processor the guest's values. `syscall`: the guest can
    /// execute SYSCALL. `foreign`: [`Host::has_foreign_msrs`].
    #[inline]
    pub fn load(&mut self, cpu: &impl Cpu, syscall: bool, foreign: bool) {
        self.syscall = syscall;
        if !self.host_known || foreign {
            self.learn_host(cpu);
            self.host_known = !foreign;
        }
        let [guest, ..] = self.guest;
        let [host, ..] = &mut self.host;
        *host = exchange(cpu, self.exchanges, guest);
        if self.has_tsc_aux {
            self.put_guest(cpu, TSC_AUX);
        }
        if syscall {
            for index in SYSCALLS {
                self.put_guest(cpu, index);
            }
        }
    }

    #[cold]
    fn learn_host(&mut self, cpu: &impl Cpu) {
        for (index, slot) in self.host.iter_mut().enumerate() {
            let fixed = index != KERNEL_GS_BASE;
            if fixed && (index != TSC_AUX || self.has_tsc_aux) {
                *slot = read(cpu, index);
            }
        }
        self.exchanges = self.may_exchange && can_exchange(cpu);
    }

    /// The guest became able to use SYSCALL while its values are loaded.
    pub fn start_syscall(&mut self, cpu: &impl Cpu, syscall: bool) {
        if syscall && !self.syscall {
            self.syscall = true;
            for index in SYSCALLS {
                self.put_guest(cpu, index);
            }
        }
    }

    /// A guest value changed while the guest's values are loaded.
    pub fn put(&self, cpu: &impl Cpu, register: u32) {
        if let Some(index) = Self::place(register).filter(|index| self.uses(*index)) {
            write(cpu, index, self.guest.get(index).copied().unwrap_or(0));
        }
    }

    /// Gives the processor the host's values back.
    #[inline]
    pub fn restore(&mut self, cpu: &impl Cpu) {
        let [host, ..] = self.host;
        let [guest, ..] = &mut self.guest;
        *guest = exchange(cpu, self.exchanges, host);
        if self.has_tsc_aux {
            self.put_host(cpu, TSC_AUX);
        }
        if self.syscall {
            for index in SYSCALLS {
                self.put_host(cpu, index);
            }
        }
    }
}
