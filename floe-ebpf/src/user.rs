//! Reading the traced process's memory. Everything in it is untrusted; a failed read is `None`.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_probe_read_user;

/// The count in a vectorcall's `nargsf`: all but `PY_VECTORCALL_ARGUMENTS_OFFSET`.
pub const ARGUMENTS: u64 = !(1 << 63);

/// Eight bytes of a text, from `at` on, as they are in memory; zeroes behind its end.
pub const fn word(text: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    let mut i = 0;
    while i < 8 && at + i < text.len() {
        bytes[i] = text[at + i];
        i += 1;
    }
    u64::from_le_bytes(bytes)
}

/// Reads a `T` of plain integers at `addr`.
#[inline(always)]
pub fn read<T: Copy>(addr: u64) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes the whole value or fails; any bit pattern is a valid `T` (integers only, in this crate).
    unsafe {
        if bpf_probe_read_user(value.as_mut_ptr().cast(), size_of::<T>() as u32, addr as *const c_void) == 0 {
            Some(value.assume_init())
        } else {
            None
        }
    }
}

/// Reads a pointer that must not be NULL.
#[inline(always)]
pub fn pointer(addr: u64) -> Option<u64> {
    match read::<u64>(addr) {
        Some(0) | None => None,
        value => value,
    }
}

/// Reads `len` bytes to `dst`. The caller bounds `len` in a way the verifier sees.
///
/// # Safety
/// `dst` must have room for `len` bytes.
#[inline(always)]
pub unsafe fn read_bytes(dst: *mut u8, len: u32, addr: u64) -> bool {
    // SAFETY: the caller's.
    unsafe { bpf_probe_read_user(dst.cast(), len, addr as *const c_void) == 0 }
}

/// `value & MASK`, in a way that the compiler cannot reason away before the verifier sees it.
macro_rules! masked {
    ($value:expr, $mask:literal) => {{
        let mut value: u64 = $value;
        // SAFETY: one arithmetic instruction on a register.
        #[allow(unused_unsafe, reason = "also used inside unsafe blocks")]
        unsafe {
            core::arch::asm!(concat!("{0} &= ", $mask), inout(reg) value, options(pure, nomem, nostack));
        }
        value
    }};
}
pub(crate) use masked;
