//! RAM blocks: the pieces of the client's memory that may become guest RAM.
//!
//! An ordinary block stays until the VM goes: clients map over all of it and
//! map it again without registering it anew. A stand-alone block is made by
//! SET_RAM for one mapping and lives as long as a slot uses it.

use alloc::boxed::Box;

use crate::Error;
use crate::fallible::NoMemory;

use super::tree::{Key, Node, Span, Tree};

/// A RAM block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    start: u64,
    end: u64,
    pub(super) standalone: bool,
    /// Slots that use it.
    pub(super) slots: usize,
}

impl Span for Block {
    fn key(&self) -> Key {
        (self.start, 0)
    }
    fn end(&self) -> u64 {
        self.end
    }
}

/// A block that has been made but not registered.
pub(super) struct NewBlock(Box<Node<Block>>);

/// The blocks of a VM, none overlapping another.
pub(super) struct Blocks {
    pub(super) tree: Tree<Block>,
    count: usize,
}

impl Blocks {
    pub(super) const fn new() -> Self {
        Self {
            tree: Tree::new(),
            count: 0,
        }
    }

    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// A block for `start..end`, if no other is in the way.
    ///
    /// # Errors
    /// [`Error::Invalid`]: another is; [`Error::NoMemory`].
    pub(super) fn prepare(
        &self,
        start: u64,
        end: u64,
        standalone: bool,
    ) -> Result<NewBlock, Error> {
        if self.tree.overlap(None, start, end).is_some() {
            return Err(Error::Invalid);
        }
        let block = Block {
            start,
            end,
            standalone,
            slots: 0,
        };
        Ok(NewBlock(
            Node::new(block).map_err(|NoMemory| Error::NoMemory)?,
        ))
    }

    /// Registers a block that `prepare` made; nothing happened in between.
    pub(super) fn register(&mut self, block: NewBlock) {
        self.tree.insert(block.0);
        self.count = self.count.saturating_add(1);
    }

    /// The start of the block that has all of `start..end` in it.
    pub(super) fn around(&self, start: u64, end: u64) -> Option<u64> {
        self.tree
            .containing(start)
            .filter(|block| end <= block.end)
            .map(|block| block.start)
    }

    /// One slot more uses the block that starts at `start`.
    pub(super) fn hold(&mut self, start: u64) {
        if let Some(block) = self.tree.get_mut((start, 0)) {
            block.slots = block.slots.saturating_add(1);
        }
    }

    /// One slot less uses the block; the last one ends a stand-alone block,
    /// whose range is then the result.
    pub(super) fn release(&mut self, start: u64) -> Option<(u64, u64)> {
        let block = self.tree.get_mut((start, 0))?;
        block.slots = block.slots.saturating_sub(1);
        if !block.standalone || block.slots != 0 {
            return None;
        }
        let ended = (block.start, block.end);
        drop(self.tree.remove((start, 0)));
        self.count = self.count.saturating_sub(1);
        Some(ended)
    }
}
