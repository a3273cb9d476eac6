//! Any bytes, in any mode: decoding ends, never panics, and does not depend on
//! bytes after the instruction.
#![no_main]

use haxm_vmx::emulate::{DecodeError, MAX_INSN_LEN, Mode, decode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for mode in [Mode::Bits16, Mode::Bits32, Mode::Bits64] {
        match decode(bytes, mode) {
            Ok(insn) => {
                let len = usize::from(insn.len);
                assert!(len >= 1 && len <= bytes.len().min(MAX_INSN_LEN));
                assert_eq!(decode(&bytes[..len], mode), Ok(insn));
                assert_eq!(decode(&bytes[..len - 1], mode), Err(DecodeError::TooShort));
            }
            Err(DecodeError::TooShort) => assert!(bytes.len() < MAX_INSN_LEN),
            Err(DecodeError::TooLong) => assert!(bytes.len() >= MAX_INSN_LEN),
            Err(DecodeError::Unsupported) => {}
        }
    }
});
