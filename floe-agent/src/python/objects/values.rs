//! Strings, bytes and numbers.

use super::{Heap, MAX_NAME, ObjectError, Result, type_flags};
use crate::python::layout::{INT_DIGITS, IntStyle, OB_SIZE, OB_TYPE};
use crate::units::UserAddr;

/// A str, or its beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The text; lone surrogates are replaced.
    pub text: String,
    /// Whether there is more of it.
    pub cut: bool,
}

impl Heap<'_> {
    /// At most `limit` characters of a str.
    pub fn text(&self, object: UserAddr, limit: usize) -> Result<Text> {
        let l = &self.layout.str;
        self.expect_flag(object, type_flags::STR, "str")?;
        let length = self.mem.read_u64(object.offset(l.length))?;
        let state = self.mem.read_u32(object.offset(l.state))?;
        let (compact, ascii) = (state & 0x20 != 0, state & 0x40 != 0);
        let width = match (state >> 2) & 7 {
            width @ (1 | 2 | 4) => width as usize,
            _ => {
                return Err(ObjectError::Odd {
                    what: "str",
                    addr: object,
                });
            }
        };
        let data = match (compact, ascii) {
            (true, true) => object.offset(l.ascii_data),
            (true, false) => object.offset(l.compact_data),
            (false, _) => self.ptr(object, l.compact_data)?,
        };
        let cut = length > limit as u64;
        let count = if cut { limit } else { length as usize };
        let bytes = self.mem.read_bytes(data, count.saturating_mul(width))?;
        let text = match width {
            1 if ascii => String::from_utf8_lossy(&bytes).into_owned(),
            1 => bytes.iter().map(|&b| char::from(b)).collect(),
            2 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&b| {
                    char::from_u32(u16::from_le_bytes(b).into())
                        .unwrap_or(char::REPLACEMENT_CHARACTER)
                })
                .collect(),
            _ => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| {
                    char::from_u32(u32::from_le_bytes(b)).unwrap_or(char::REPLACEMENT_CHARACTER)
                })
                .collect(),
        };
        Ok(Text { text, cut })
    }

    /// A whole str of at most [`MAX_NAME`] characters.
    pub fn name(&self, object: UserAddr) -> Result<String> {
        let Text { text, cut } = self.text(object, MAX_NAME)?;
        if cut {
            let len = self.mem.read_u64(object.offset(self.layout.str.length))?;
            return Err(ObjectError::TooLarge {
                what: "str",
                addr: object,
                len,
                limit: MAX_NAME,
            });
        }
        Ok(text)
    }

    /// Whether the object is a str with this text. One read where it is, and mostly one where it is not.
    pub fn str_is(&self, object: UserAddr, wanted: &str) -> bool {
        const ROOM: usize = 48 + 128;
        let l = &self.layout.str;
        let data = l.ascii_data as usize;
        let len = data + wanted.len();
        let whole = || {
            self.text(object, wanted.chars().count())
                .is_ok_and(|read| !read.cut && read.text == wanted)
        };
        if !wanted.is_ascii() || len > ROOM {
            return whole();
        }
        let mut buf = [0; ROOM];
        if self.mem.read(object, &mut buf[..len]).is_err() {
            return false; // shorter, or a subclass at the end of a mapping
        }
        let u64_at = |at: u64| {
            u64::from_le_bytes(
                buf[at as usize..at as usize + 8]
                    .try_into()
                    .expect("eight bytes"),
            )
        };
        if u64_at(l.length) != wanted.len() as u64 {
            return false;
        }
        if u64_at(OB_TYPE) != self.types.str.0 || buf[l.state as usize] & 0x60 != 0x60 {
            return whole();
        }
        buf[data..len] == *wanted.as_bytes()
    }

    /// An int that fits 64 bits; bools are ints.
    pub fn int(&self, object: UserAddr) -> Result<i64> {
        self.expect_flag(object, type_flags::LONG, "int")?;
        let head = self.mem.read_u64(object.offset(OB_SIZE))?;
        let (negative, digits) = match self.layout.int {
            IntStyle::ObSize => (head.cast_signed() < 0, head.cast_signed().unsigned_abs()),
            IntStyle::LvTag => (head & 3 == 2, head >> 3),
        };
        if digits > 3 {
            return Err(ObjectError::TooLarge {
                what: "int",
                addr: object,
                len: digits,
                limit: 3,
            });
        }
        let mut value: i128 = 0;
        for i in 0..digits {
            let digit = self.mem.read_u32(object.offset(INT_DIGITS + 4 * i))? & 0x3fff_ffff;
            value |= i128::from(digit) << (30 * i);
        }
        let value = if negative { -value } else { value };
        i64::try_from(value).map_err(|_| ObjectError::TooLarge {
            what: "int",
            addr: object,
            len: digits,
            limit: 3,
        })
    }

    /// A float.
    pub fn float(&self, object: UserAddr) -> Result<f64> {
        self.expect_type(object, self.types.float, "float")?;
        Ok(f64::from_bits(
            self.mem
                .read_u64(object.offset(self.layout.small.float_value))?,
        ))
    }

    /// The bytes of a bytes object of at most `limit` bytes.
    pub fn bytes(&self, object: UserAddr, limit: usize) -> Result<Vec<u8>> {
        self.expect_flag(object, type_flags::BYTES, "bytes")?;
        let len = self.mem.read_u64(object.offset(OB_SIZE))?;
        if len > limit as u64 {
            return Err(ObjectError::TooLarge {
                what: "bytes object",
                addr: object,
                len,
                limit,
            });
        }
        Ok(self
            .mem
            .read_bytes(object.offset(self.layout.small.bytes_data), len as usize)?)
    }
}
