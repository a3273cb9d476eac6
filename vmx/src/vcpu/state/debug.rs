//! Debug registers: the guest's own, and a client's breakpoints.
//!
//! MOV to and from debug registers always exits, so DR0-3 and DR6 are kept
//! here, and the processor gets DR0-3 only while some breakpoint is enabled.
//! DR7 is in the VMCS.
// UNSAFETY: writes debug registers, host values put back by `restore`.
#![expect(unsafe_code)]

use abi::debug::{DebugControl, VcpuDebug};

use crate::arch::event::vector;
use crate::arch::field;
use crate::arch::reg::{DR6_RESET, DR6_WRITABLE, DR7_GD, DR7_RESET, DR7_WRITABLE};
use crate::cpu::Cpu;
use crate::host::Host;
use crate::vcpu::vmcs::Current;

/// The enable bits L0 to G3 of DR7, SDM 18.2.4 "Debug Control Register (DR7)".
const ENABLES: u64 = 0xff;

/// Debug registers of a vCPU.
pub struct DebugRegisters {
    guest: [u64; 4],
    guest_dr6: u64,
    /// The guest's DR7. Only MOV DR and #DB change it, and both exit.
    guest_dr7: u64,
    control: DebugControl,
    client: [u64; 4],
    client_dr7: u64,
    host: [u64; 4],
    /// The processor has this vCPU's DR0-3.
    loaded: bool,
    /// See [`DebugRegisters::is_used`].
    used: bool,
}

impl Default for DebugRegisters {
    fn default() -> Self {
        Self {
            guest: [0; 4],
            guest_dr6: DR6_RESET,
            guest_dr7: DR7_RESET,
            control: DebugControl::empty(),
            client: [0; 4],
            client_dr7: DR7_RESET,
            host: [0; 4],
            loaded: false,
            used: false,
        }
    }
}

fn dr7_fixed(value: u64) -> u64 {
    (value & DR7_WRITABLE) | DR7_RESET
}

fn dr6_fixed(value: u64) -> u64 {
    // SDM 18.2.3: bits 4 to 11 and 17 to 31 read as 1; RTM reads as 1 when clear.
    (value & DR6_WRITABLE) | (DR6_RESET & !DR6_WRITABLE)
}

impl DebugRegisters {
    /// A client debugs this vCPU.
    pub fn is_enabled(&self) -> bool {
        self.control.contains(DebugControl::ENABLE)
    }

    /// A client single-steps it.
    #[inline]
    pub fn steps(&self) -> bool {
        let both = DebugControl::ENABLE | DebugControl::STEP;
        self.control.contains(both)
    }

    /// #DB belongs to the client.
    pub fn takes_debug_exceptions(&self) -> bool {
        self.is_enabled()
            && self
                .control
                .intersects(DebugControl::STEP | DebugControl::USE_HW_BP)
    }

    /// #BP belongs to the client.
    pub fn takes_breakpoints(&self) -> bool {
        self.is_enabled() && self.control.contains(DebugControl::USE_SW_BP)
    }

    /// Exceptions to intercept for the client, as bits of the bitmap.
    pub fn intercepts(&self) -> u32 {
        if self.takes_breakpoints() {
            1 << vector::BP
        } else {
            0
        }
    }

    /// VCPU_DEBUG.
    pub fn configure<H: Host>(&mut self, current: &Current<'_, H>, debug: &VcpuDebug) {
        self.control = DebugControl::from_bits_retain(debug.control);
        let uses_hardware = self.is_enabled() && self.control.contains(DebugControl::USE_HW_BP);
        self.client = [0; 4];
        self.client_dr7 = DR7_RESET;
        if uses_hardware {
            let [d0, d1, d2, d3, _, _, _, d7] = debug.dr;
            self.client = [d0, d1, d2, d3];
            self.client_dr7 = dr7_fixed(d7);
        }
        self.changed();
        current.put(field::GUEST_DR7, self.dr7());
    }

    /// DR7, or who debugs, changed.
    fn changed(&mut self) {
        self.used = self.steps() || self.is_watching();
    }

    /// A breakpoint is enabled, or a client single-steps.
    #[inline]
    pub fn is_used(&self) -> bool {
        self.used
    }

    /// The client sets the guest's registers.
    pub fn set_guest(&mut self, breakpoints: [u64; 4], dr6: u64, dr7: u64) {
        self.guest = breakpoints;
        self.guest_dr6 = dr6_fixed(dr6);
        self.guest_dr7 = dr7_fixed(dr7);
        self.changed();
    }

    /// What the VMCS's DR7 should be.
    pub fn dr7(&self) -> u64 {
        if self.is_enabled() {
            self.client_dr7
        } else {
            self.guest_dr7
        }
    }

    /// The guest's DR0-3.
    pub fn guest_breakpoints(&self) -> [u64; 4] {
        self.guest
    }

    /// The guest's DR6.
    pub fn guest_dr6(&self) -> u64 {
        self.guest_dr6
    }

    /// The guest's DR7.
    pub fn guest_dr7(&self) -> u64 {
        self.guest_dr7
    }

    /// Delivering #DB clears DR7.GD: SDM 18.2.4.
    pub fn clear_general_detect<H: Host>(&mut self, current: &Current<'_, H>) {
        if self.guest_dr7 & DR7_GD != 0 {
            self.guest_dr7 &= !DR7_GD;
            current.put(field::GUEST_DR7, self.dr7());
        }
    }

    /// Some breakpoint is enabled, the guest's or the client's.
    pub fn is_watching(&self) -> bool {
        self.dr7() & ENABLES != 0
    }

    /// The data breakpoints, as bits B0 to B3 of DR6, that an access to `length`
    /// bytes at `linear` meets: SDM 18.2.5 "Breakpoint Field Recognition".
    pub fn matches(&self, linear: u64, length: u8, write: bool) -> u8 {
        let dr7 = self.dr7();
        let addresses = if self.is_enabled() {
            self.client
        } else {
            self.guest
        };
        let mut found = 0;
        for (number, address) in (0u32..).zip(addresses) {
            let enabled = dr7.wrapping_shr(number.wrapping_mul(2)) & 3 != 0;
            let field = dr7.wrapping_shr(number.wrapping_mul(4).wrapping_add(16));
            // R/W: 1 is writes, 3 reads too; LEN: 1, 2, 8 or 4 bytes.
            let kind = field & 3;
            let size = match field >> 2 & 3 {
                0 => 1u64,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = address & !size.wrapping_sub(1);
            let apart = linear.wrapping_sub(start);
            let behind = start.wrapping_sub(linear);
            let meets = apart < size || behind < u64::from(length);
            if enabled && meets && (kind == 3 || kind == 1 && write) {
                found |= 1 << number;
            }
        }
        found
    }

    /// Adds the conditions of a #DB to the guest's DR6: SDM 28.2.1, table 28-1
    /// "Exit Qualification for Debug Exceptions".
    pub fn record(&mut self, qualification: u64) {
        // B0-3 of earlier #DBs stay unless new ones are reported.
        let kept = if qualification & 0xf != 0 {
            self.guest_dr6 & !0xf
        } else {
            self.guest_dr6
        };
        self.guest_dr6 = dr6_fixed(kept | (qualification & 0xe00f));
    }

    /// One of the guest's registers; `index` 4 and 5 are 6 and 7.
    pub fn read(&self, index: u8) -> u64 {
        match index {
            4 | 6 => self.guest_dr6,
            5 | 7 => self.guest_dr7,
            _ => self
                .guest
                .get(usize::from(index))
                .copied()
                .unwrap_or_default(),
        }
    }

    /// The guest writes a register; `false` if the value is refused: the upper
    /// halves of DR6 and DR7 must be 0 (SDM 18.2 "Debug Registers").
    pub fn write<H: Host>(&mut self, current: &Current<'_, H>, index: u8, value: u64) -> bool {
        match index {
            4..=7 if value >> 32 != 0 => return false,
            4 | 6 => self.guest_dr6 = dr6_fixed(value),
            5 | 7 => {
                self.guest_dr7 = dr7_fixed(value);
                self.changed();
                if !self.is_enabled() {
                    current.put(field::GUEST_DR7, self.guest_dr7);
                }
            }
            _ => {
                if let Some(slot) = self.guest.get_mut(usize::from(index)) {
                    *slot = value;
                }
                if self.loaded {
                    self.put(current.cpu());
                }
            }
        }
        true
    }

    fn put(&self, cpu: &impl Cpu) {
        let values = if self.is_enabled() {
            self.client
        } else {
            self.guest
        };
        for (index, value) in (0u8..).zip(values) {
            // SAFETY: `restore` puts the host's back before interrupts are on.
            unsafe { cpu.set_dr(index, value) };
        }
    }

    /// Gives the processor this vCPU's DR0-3 if any of its breakpoints is
    /// enabled.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn load(&mut self, cpu: &impl Cpu) {
        if self.loaded || self.dr7() & ENABLES == 0 {
            return;
        }
        for (index, slot) in (0u8..).zip(self.host.iter_mut()) {
            *slot = cpu.dr(index);
        }
        self.loaded = true;
        self.put(cpu);
    }

    /// Gives the processor the host's DR0-3 back. DR6 is still the host's: MOV DR exits, and so
    /// does every #DB, before it changes DR6 (SDM 28.1 "Architectural State Before a VM Exit").
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn restore(&mut self, cpu: &impl Cpu) {
        if !self.loaded {
            return;
        }
        for (index, value) in (0u8..).zip(self.host) {
            // SAFETY: the host's own values.
            unsafe { cpu.set_dr(index, value) };
        }
        self.loaded = false;
    }
}
