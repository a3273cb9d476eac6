//! An ordered set of address ranges: an AVL tree whose one primitive is `join`.
//!
//! Everything is O(log n), also cutting a whole range of entries out, so it can
//! be done under a spin lock. Nothing here allocates or frees: the caller makes
//! nodes beforehand and drops them afterwards. Recursion goes as deep as the
//! tree is high, at most 1.44 log2(n): 29 levels for a million entries.
//!
//! Join-based trees: Blelloch, Ferizovic, Sun, "Just Join for Parallel Ordered
//! Sets", SPAA 2016.

use alloc::boxed::Box;

use crate::fallible::{NoMemory, try_box};

/// What orders entries: the start of the range, then a number that tells
/// entries with equal starts apart.
pub(super) type Key = (u64, u64);

/// An entry of a tree: a range of addresses.
pub(super) trait Span {
    /// Start of the range, and the tie-breaker; unique within a tree.
    fn key(&self) -> Key;
    /// First address past the range; above the start.
    fn end(&self) -> u64;
}

/// An entry with its links. Made before a lock is taken, dropped after.
pub(super) struct Node<T> {
    /// The entry. Its key must not change while the node is in a tree.
    pub(super) item: T,
    left: Link<T>,
    right: Link<T>,
    height: u8,
    /// The largest end in this subtree.
    max_end: u64,
}

pub(super) type Link<T> = Option<Box<Node<T>>>;

impl<T: Span> Node<T> {
    /// A node outside any tree.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub(super) fn new(item: T) -> Result<Box<Self>, NoMemory> {
        try_box(Self {
            max_end: item.end(),
            item,
            left: None,
            right: None,
            height: 1,
        })
    }

    fn refresh(&mut self) {
        let mut end = self.item.end();
        for child in [&self.left, &self.right].into_iter().flatten() {
            end = end.max(child.max_end);
        }
        self.max_end = end;
        self.height = height(&self.left)
            .max(height(&self.right))
            .saturating_add(1);
    }

    fn with(mut self: Box<Self>, left: Link<T>, right: Link<T>) -> Box<Self> {
        self.left = left;
        self.right = right;
        self.refresh();
        self
    }
}

fn height<T>(link: &Link<T>) -> u8 {
    link.as_ref().map_or(0, |node| node.height)
}

fn much_higher<T>(a: &Link<T>, b: &Link<T>) -> bool {
    height(a) > height(b).saturating_add(1)
}

fn rotate_left<T: Span>(mut node: Box<Node<T>>) -> Box<Node<T>> {
    let Some(mut up) = node.right.take() else {
        return node;
    };
    node.right = up.left.take();
    node.refresh();
    up.left = Some(node);
    up.refresh();
    up
}

fn rotate_right<T: Span>(mut node: Box<Node<T>>) -> Box<Node<T>> {
    let Some(mut up) = node.left.take() else {
        return node;
    };
    node.left = up.right.take();
    node.refresh();
    up.right = Some(node);
    up.refresh();
    up
}

/// A balanced tree of everything in `left`, `middle`, `right`, in this order.
fn join<T: Span>(left: Link<T>, middle: Box<Node<T>>, right: Link<T>) -> Box<Node<T>> {
    if much_higher(&left, &right) {
        if let Some(left) = left {
            return join_right(left, middle, right);
        }
        return middle.with(None, right);
    }
    if much_higher(&right, &left) {
        if let Some(right) = right {
            return join_left(left, middle, right);
        }
        return middle.with(left, None);
    }
    middle.with(left, right)
}

/// As `join`, `left` being the higher one: goes down its right spine.
fn join_right<T: Span>(
    mut left: Box<Node<T>>,
    middle: Box<Node<T>>,
    right: Link<T>,
) -> Box<Node<T>> {
    let spine = left.right.take();
    if let Some(spine) = spine {
        if spine.height > height(&right).saturating_add(1) {
            left.right = Some(join_right(spine, middle, right));
        } else {
            let joined = middle.with(Some(spine), right);
            let lean = joined.height > height(&left.left).saturating_add(1);
            left.right = Some(if lean { rotate_right(joined) } else { joined });
        }
    } else {
        left.right = Some(middle.with(None, right));
    }
    if much_higher(&left.right, &left.left) {
        return rotate_left(left);
    }
    left.refresh();
    left
}

/// As `join`, `right` being the higher one: goes down its left spine.
fn join_left<T: Span>(
    left: Link<T>,
    middle: Box<Node<T>>,
    mut right: Box<Node<T>>,
) -> Box<Node<T>> {
    let spine = right.left.take();
    if let Some(spine) = spine {
        if spine.height > height(&left).saturating_add(1) {
            right.left = Some(join_left(left, middle, spine));
        } else {
            let joined = middle.with(left, Some(spine));
            let lean = joined.height > height(&right.right).saturating_add(1);
            right.left = Some(if lean { rotate_left(joined) } else { joined });
        }
    } else {
        right.left = Some(middle.with(left, None));
    }
    if much_higher(&right.left, &right.right) {
        return rotate_right(right);
    }
    right.refresh();
    right
}

/// Entries below `key`, and the others.
fn split<T: Span>(link: Link<T>, key: Key) -> (Link<T>, Link<T>) {
    let Some(mut node) = link else {
        return (None, None);
    };
    let (left, right) = (node.left.take(), node.right.take());
    if node.item.key() < key {
        let (below, rest) = split(right, key);
        (Some(join(left, node, below)), rest)
    } else {
        let (below, rest) = split(left, key);
        (below, Some(join(rest, node, right)))
    }
}

fn split_last<T: Span>(mut node: Box<Node<T>>) -> (Link<T>, Box<Node<T>>) {
    let left = node.left.take();
    match node.right.take() {
        None => (left, node),
        Some(right) => {
            let (rest, last) = split_last(right);
            (Some(join(left, node, rest)), last)
        }
    }
}

fn split_first<T: Span>(mut node: Box<Node<T>>) -> (Box<Node<T>>, Link<T>) {
    let right = node.right.take();
    match node.left.take() {
        None => (node, right),
        Some(left) => {
            let (first, rest) = split_first(left);
            (first, Some(join(rest, node, right)))
        }
    }
}

/// The tree with `node` in it. What comes back from below differs by one in
/// height, so each `join` is one step.
fn insert<T: Span>(link: Link<T>, node: Box<Node<T>>) -> Box<Node<T>> {
    let Some(mut here) = link else {
        return node.with(None, None);
    };
    let (left, right) = (here.left.take(), here.right.take());
    if node.item.key() < here.item.key() {
        join(Some(insert(left, node)), here, right)
    } else {
        join(left, here, Some(insert(right, node)))
    }
}

/// The tree without the entry of this key, and that entry.
fn remove<T: Span>(link: Link<T>, key: Key) -> (Link<T>, Link<T>) {
    let Some(mut here) = link else {
        return (None, None);
    };
    let (left, right) = (here.left.take(), here.right.take());
    if key < here.item.key() {
        let (left, found) = remove(left, key);
        return (Some(join(left, here, right)), found);
    }
    if here.item.key() < key {
        let (right, found) = remove(right, key);
        return (Some(join(left, here, right)), found);
    }
    let rest = match (left, right) {
        (None, other) | (other, None) => other,
        (Some(left), right) => {
            let (rest, last) = split_last(left);
            Some(join(rest, last, right))
        }
    };
    (rest, Some(here))
}

/// An ordered set of ranges.
pub(super) struct Tree<T> {
    root: Link<T>,
}

impl<T: Span> Tree<T> {
    /// The empty set.
    pub(super) const fn new() -> Self {
        Self { root: None }
    }

    /// Puts a node in.
    pub(super) fn insert(&mut self, node: Box<Node<T>>) {
        self.root = Some(insert(self.root.take(), node));
    }

    /// Takes the entry with this key out.
    pub(super) fn remove(&mut self, key: Key) -> Link<T> {
        let (rest, mut found) = remove(self.root.take(), key);
        self.root = rest;
        // Its links are gone; what they led to counts no longer.
        if let Some(node) = &mut found {
            node.refresh();
        }
        found
    }

    /// Takes the entries from `key` up out.
    pub(super) fn split_off(&mut self, key: Key) -> Self {
        let (below, rest) = split(self.root.take(), key);
        self.root = below;
        Self { root: rest }
    }

    /// Puts the entries of `above` in; all come after the present ones.
    pub(super) fn append(&mut self, mut above: Self) {
        self.root = match (self.root.take(), above.root.take()) {
            (None, other) | (other, None) => other,
            (Some(below), above) => {
                let (rest, last) = split_last(below);
                Some(join(rest, last, above))
            }
        };
    }

    /// Takes the first entry out.
    pub(super) fn pop_first(&mut self) -> Link<T> {
        let (first, rest) = split_first(self.root.take()?);
        self.root = rest;
        Some(first)
    }

    /// Takes the last entry out.
    pub(super) fn pop_last(&mut self) -> Link<T> {
        let (rest, last) = split_last(self.root.take()?);
        self.root = rest;
        Some(last)
    }

    /// The last entry at or below `key`.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn floor(&self, key: Key) -> Option<&T> {
        let mut best = None;
        let mut link = &self.root;
        while let Some(node) = link {
            if node.item.key() <= key {
                best = Some(&node.item);
                link = &node.right;
            } else {
                link = &node.left;
            }
        }
        best
    }

    /// The entry with the highest start among those that contain `address`,
    /// in a tree whose entries do not overlap.
    pub(super) fn containing(&self, address: u64) -> Option<&T> {
        self.floor((address, u64::MAX))
            .filter(|item| item.end() > address)
    }

    /// Changes the entry with this key in place; the change must keep its key
    /// and its end.
    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let mut link = &mut self.root;
        while let Some(node) = link {
            let here = node.item.key();
            if here == key {
                return Some(&mut node.item);
            }
            link = if here < key {
                &mut node.right
            } else {
                &mut node.left
            };
        }
        None
    }

    /// The first entry after `after` (or at all) that shares an address with
    /// `start..end`.
    pub(super) fn overlap(&self, after: Option<Key>, start: u64, end: u64) -> Option<&T> {
        overlap(&self.root, after, start, end)
    }

    /// Whether nothing is in it.
    pub(super) const fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    /// All entries, in order, of a tree that is as it should be.
    #[cfg(not(haxm_module))]
    pub(super) fn checked(&self) -> alloc::vec::Vec<T>
    where
        T: Copy,
    {
        fn visit<T: Span + Copy>(link: &Link<T>, found: &mut alloc::vec::Vec<T>) {
            let Some(node) = link else { return };
            visit(&node.left, found);
            let last = found.last().map(Span::key);
            assert!(last < Some(node.item.key()), "a tree out of order");
            found.push(node.item);
            visit(&node.right, found);
            let (left, right) = (height(&node.left), height(&node.right));
            assert!(left.abs_diff(right) <= 1, "a tree out of balance");
            let ends = [&node.left, &node.right]
                .into_iter()
                .flatten()
                .map(|child| child.max_end);
            let max_end = ends.fold(node.item.end(), u64::max);
            let wanted = (left.max(right).saturating_add(1), max_end);
            assert_eq!((node.height, node.max_end), wanted, "a stale node");
        }
        let mut found = alloc::vec::Vec::new();
        visit(&self.root, &mut found);
        found
    }
}

#[cfg_attr(haxm_module, optimize(speed))]
fn overlap<T: Span>(link: &Link<T>, after: Option<Key>, start: u64, end: u64) -> Option<&T> {
    let mut link = link;
    while let Some(node) = link {
        if node.max_end <= start {
            return None;
        }
        let key = node.item.key();
        if after.is_none_or(|after| key > after) {
            if let Some(found) = overlap(&node.left, after, start, end) {
                return Some(found);
            }
            if key.0 >= end {
                return None;
            }
            if node.item.end() > start {
                return Some(&node.item);
            }
        }
        link = &node.right;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    struct Piece {
        start: u64,
        id: u64,
        end: u64,
    }

    impl Span for Piece {
        fn key(&self) -> Key {
            (self.start, self.id)
        }
        fn end(&self) -> u64 {
            self.end
        }
    }

    fn random(state: &mut u64, below: u64) -> u64 {
        *state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (*state >> 33) % below
    }

    /// Every operation against an ordered map and a linear search, with the
    /// balance and the cached ends checked after each.
    #[test]
    fn behaves_like_an_ordered_map() {
        let mut tree = Tree::new();
        let mut model = BTreeMap::new();
        let mut state = 7;
        for step in 0..6000u64 {
            let start = random(&mut state, 400);
            match random(&mut state, 8) {
                0..=3 => {
                    let piece = Piece {
                        start,
                        id: step,
                        end: start + 1 + random(&mut state, 60),
                    };
                    model.insert(piece.key(), piece);
                    tree.insert(Node::new(piece).unwrap());
                }
                4 => {
                    let key = model.keys().nth(start as usize).copied();
                    if let Some(key) = key {
                        let removed = tree.remove(key).map(|node| node.item);
                        assert_eq!(removed, model.remove(&key));
                    }
                    assert!(tree.remove((start, u64::MAX)).is_none());
                }
                5 => {
                    let (a, b) = (start, start + random(&mut state, 20));
                    let mut middle = tree.split_off((a, 0));
                    let above = middle.split_off((b, 0));
                    assert_eq!(middle.checked().len(), model.range((a, 0)..(b, 0)).count());
                    tree.append(above);
                    model.retain(|key, _| *key < (a, 0) || *key >= (b, 0));
                }
                6 => {
                    let first = tree.pop_first().map(|node| node.item);
                    assert_eq!(first, model.pop_first().map(|(_, piece)| piece));
                }
                _ => {
                    let last = tree.pop_last().map(|node| node.item);
                    assert_eq!(last, model.pop_last().map(|(_, piece)| piece));
                }
            }
            assert_eq!(tree.checked().len(), model.len());
            let key = (random(&mut state, 420), step / 2);
            let floor = model.range(..=key).next_back().map(|(_, piece)| *piece);
            assert_eq!(tree.floor(key).copied(), floor);
            let (a, b) = (key.0, key.0 + 1 + random(&mut state, 30));
            let expected: Vec<_> = model
                .values()
                .filter(|piece| piece.start < b && piece.end > a)
                .copied()
                .collect();
            let mut found = Vec::new();
            let mut after = None;
            while let Some(piece) = tree.overlap(after, a, b) {
                after = Some(piece.key());
                found.push(*piece);
            }
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn stays_low_when_keys_come_in_order() {
        let mut tree = Tree::new();
        for i in 0..100_000u64 {
            tree.insert(
                Node::new(Piece {
                    start: i,
                    id: 0,
                    end: i + 1,
                })
                .unwrap(),
            );
        }
        assert!(height(&tree.root) <= 24, "{}", height(&tree.root));
        assert_eq!(tree.checked().len(), 100_000);
    }
}
