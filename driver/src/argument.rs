//! A request's argument, by the three ways operating systems pass one: as an address in the
//! caller, copied by the kernel before and after, or in one buffer for both directions.

use abi::zerocopy::{FromBytes, IntoBytes};

use crate::shim::Shim;
use crate::status::Failure;

/// Reads and writes a request's argument. No byte is read twice by one
/// request, so what was checked is what is used.
pub(crate) trait Argument {
    /// Copies bytes from `at`.
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), Failure>;
    /// Writes bytes at `at`.
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Failure>;
    /// Refuses if it is known that fewer than `size` bytes can be read.
    fn check_given(&self, size: usize) -> Result<(), Failure>;
    /// Refuses if it is known that fewer than `size` bytes can be written.
    fn check_room(&self, size: usize) -> Result<(), Failure>;

    /// Copies the argument in.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn get<T: FromBytes + IntoBytes>(&self) -> Result<T, Failure> {
        let mut value = T::new_zeroed();
        self.fill(&mut value)?;
        Ok(value)
    }

    /// Copies the argument to where it is used: for one of hundreds of bytes,
    /// of which the stack should not hold several.
    fn fill<T: FromBytes + IntoBytes>(&self, value: &mut T) -> Result<(), Failure> {
        self.read(0, value.as_mut_bytes())
    }
}

/// An address in the calling process.
pub(crate) struct UserArgument<'s, S: Shim> {
    pub(crate) shim: &'s S,
    pub(crate) address: u64,
}

impl<S: Shim> UserArgument<'_, S> {
    fn address(&self, at: usize) -> Result<u64, Failure> {
        let offset = u64::try_from(at).map_err(|_| Failure::Short)?;
        self.address.checked_add(offset).ok_or(Failure::Short)
    }
}

impl<S: Shim> Argument for UserArgument<'_, S> {
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), Failure> {
        Ok(self.shim.copy_in(self.address(at)?, bytes)?)
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Failure> {
        Ok(self.shim.copy_out(self.address(at)?, bytes)?)
    }

    fn check_given(&self, _: usize) -> Result<(), Failure> {
        Ok(())
    }

    fn check_room(&self, _: usize) -> Result<(), Failure> {
        Ok(())
    }
}

/// Kernel memory that the system copies from the caller before the request
/// and back to it after one that succeeds.
pub(crate) struct CopiedArgument<'b>(pub(crate) &'b mut [u8]);

impl Argument for CopiedArgument<'_> {
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), Failure> {
        copy_from(self.0, at, bytes)
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Failure> {
        copy_to(self.0, at, bytes)
    }

    fn check_given(&self, size: usize) -> Result<(), Failure> {
        fits(size, self.0.len())
    }

    fn check_room(&self, size: usize) -> Result<(), Failure> {
        fits(size, self.0.len())
    }
}

/// One buffer for both directions, with a length for each.
pub(crate) struct BufferedArgument<'b> {
    buffer: &'b mut [u8],
    given: usize,
    room: usize,
    written: usize,
}

impl<'b> BufferedArgument<'b> {
    /// The caller gave the first `given` bytes and takes back at most `room`.
    pub(crate) fn new(buffer: &'b mut [u8], given: usize, room: usize) -> Self {
        let length = buffer.len();
        Self {
            buffer,
            given: given.min(length),
            room: room.min(length),
            written: 0,
        }
    }

    /// Bytes from the start that the caller is to get.
    pub(crate) fn written(&self) -> usize {
        self.written
    }
}

impl Argument for BufferedArgument<'_> {
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), Failure> {
        let given = self.buffer.get(..self.given).ok_or(Failure::Short)?;
        copy_from(given, at, bytes)
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Failure> {
        let room = self.buffer.get_mut(..self.room).ok_or(Failure::Short)?;
        copy_to(room, at, bytes)?;
        self.written = self.written.max(at.saturating_add(bytes.len()));
        Ok(())
    }

    fn check_given(&self, size: usize) -> Result<(), Failure> {
        fits(size, self.given)
    }

    fn check_room(&self, size: usize) -> Result<(), Failure> {
        fits(size, self.room)
    }
}

fn fits(size: usize, length: usize) -> Result<(), Failure> {
    (size <= length).then_some(()).ok_or(Failure::Short)
}

fn copy_from(from: &[u8], at: usize, to: &mut [u8]) -> Result<(), Failure> {
    let piece = from
        .get(at..)
        .and_then(|rest| rest.get(..to.len()))
        .ok_or(Failure::Short)?;
    to.copy_from_slice(piece);
    Ok(())
}

fn copy_to(to: &mut [u8], at: usize, from: &[u8]) -> Result<(), Failure> {
    let piece = to
        .get_mut(at..)
        .and_then(|rest| rest.get_mut(..from.len()))
        .ok_or(Failure::Short)?;
    piece.copy_from_slice(from);
    Ok(())
}
