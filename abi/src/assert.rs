//! The compile-time check of every offset of a structure.

/// Asserts size, alignment and the span of every field of a structure, and that the fields fill it.
macro_rules! assert_layout {
    ($ty:ident, size $size:literal, align $align:literal; $($field:ident $start:literal .. $end:literal),+) => {
        static_assertions::const_assert_eq!(size_of::<$ty>(), $size);
        static_assertions::const_assert_eq!(align_of::<$ty>(), $align);
        $(
            static_assertions::const_assert_eq!(memoffset::offset_of!($ty, $field), $start);
            static_assertions::const_assert_eq!(
                $crate::assert::size_of_field(|value: &$ty| &value.$field),
                $end - $start
            );
        )+
        // The spans listed cover the structure, so no field was left out.
        static_assertions::const_assert_eq!(0 $(+ $end - $start)+, $size);
    };
}
pub(crate) use assert_layout;

/// Size of the type a field projection yields. The projection is never called.
pub(crate) const fn size_of_field<T, F>(_projection: fn(&T) -> &F) -> usize {
    size_of::<F>()
}
