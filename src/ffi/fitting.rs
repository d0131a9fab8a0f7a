//! Text in arrays of fixed size.

use std::ffi::c_char;

/// The bytes of a text for an array of `room` bytes: as many whole characters as fit, and a NUL. A NUL inside the text,
/// which a key may contain, would end it early, and is replaced by a space.
pub(crate) fn fitting(text: &str, room: usize) -> impl Iterator<Item = u8> {
    let mut length = text.len().min(room - 1);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    text.as_bytes()[..length].iter().map(|&byte| if byte == 0 { b' ' } else { byte }).chain([0])
}

/// The result of `fitting` as an array.
pub(crate) fn array<const SIZE: usize>(text: &str) -> [c_char; SIZE] {
    let mut array = [0; SIZE];
    for (to, byte) in array.iter_mut().zip(fitting(text, SIZE)) {
        *to = byte as c_char;
    }
    array
}
