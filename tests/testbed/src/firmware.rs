//! What the BIOS does to IA32_FEATURE_CONTROL: Bochs' own sets bits 0 and 2 (locked, VMX on) on
//! every processor that has VMX. For a PC whose owner switched VT-x off in the firmware, those
//! instructions are given another value.

use anyhow::{Result, ensure};

/// Locked with VMX off (SDM volume 4, table 2-2, IA32_FEATURE_CONTROL: bit 0 lock, bit 2 enable VMX
/// outside SMX).
pub const LOCKED_OFF: u8 = 1;
/// Locked with VMX on.
pub const LOCKED_ON: u8 = 5;
/// Neither locked nor on.
pub const OPEN: u8 = 0;

/// `mov $0x3a, %ecx; rdmsr; or $5, %eax; wrmsr`, as 32-bit code and as 16-bit code with its prefixes
/// after the first opcode; the value is the last byte but two.
const SEQUENCES: [&[u8]; 2] = [
    &[
        0xb9, 0x3a, 0, 0, 0, 0x0f, 0x32, 0x83, 0xc8, LOCKED_ON, 0x0f, 0x30,
    ],
    &[
        0xb9, 0x3a, 0, 0, 0, 0x0f, 0x32, 0x66, 0x83, 0xc8, LOCKED_ON, 0x0f, 0x30,
    ],
];

/// The BIOS image with `value` in place of 5.
///
/// # Errors
/// The image does not hold the sequence once for the first processor and once for the others.
pub fn with_feature_control(bios: &[u8], value: u8) -> Result<Vec<u8>> {
    let mut image = bios.to_vec();
    if value == LOCKED_ON {
        return Ok(image);
    }
    ensure!(
        value < 0x80,
        "IA32_FEATURE_CONTROL: {value:#x} does not fit the BIOS's instruction"
    );
    let mut found = 0;
    for sequence in SEQUENCES {
        let places = image.windows(sequence.len()).enumerate();
        let places: Vec<usize> = places
            .filter(|(_, w)| *w == sequence)
            .map(|(i, _)| i)
            .collect();
        for at in places {
            image[at + sequence.len() - 3] = value;
            found += 1;
        }
    }
    ensure!(
        found == 2,
        "this BIOS sets IA32_FEATURE_CONTROL in {found} places, not in two"
    );
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_places_change_and_nothing_else() {
        let mut bios = vec![0x3a; 40];
        bios[3..15].copy_from_slice(SEQUENCES[0]);
        bios[20..33].copy_from_slice(SEQUENCES[1]);
        let patched = with_feature_control(&bios, LOCKED_OFF).unwrap();
        let changed: Vec<_> = (0..40).filter(|&i| patched[i] != bios[i]).collect();
        assert_eq!(changed, [12, 30]);
        assert_eq!((patched[12], patched[30]), (1, 1));
        assert_eq!(with_feature_control(&bios, LOCKED_ON).unwrap(), bios);
        bios[20] = 0;
        assert!(with_feature_control(&bios, OPEN).is_err());
    }
}
