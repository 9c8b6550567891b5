//! Bytes of the ring buffers to typed events. Pure; a record that does not fit its type is an error, never a panic.

use bytemuck::{AnyBitPattern, try_pod_read_unaligned};
use floe_ebpf::{CallEnter, CallReturn, Field, Header, ProcessEvent, Urgent, enter_flags, event, outcome, value};
use thiserror::Error;

use super::event::{Event, FieldValue, Outcome, Stamp, Value};
use crate::units::{BootNanos, Epoch, Pid, ProbeId, Tid, UserAddr};

/// A record that cannot be decoded. It means that the programs and the agent do not fit together.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "a record of {len} bytes from the kernel does not decode ({what}); the eBPF object does not belong to this agent"
)]
pub struct DecodeError {
    /// What is wrong.
    pub what: &'static str,
    /// Length of the record.
    pub len: usize,
}

fn head<T: AnyBitPattern>(bytes: &[u8]) -> Result<(T, &[u8]), DecodeError> {
    let error = DecodeError { what: "shorter than its head", len: bytes.len() };
    let (head, rest) = bytes.split_at_checked(size_of::<T>()).ok_or(error)?;
    Ok((try_pod_read_unaligned(head).map_err(|_| error)?, rest))
}

fn stamp(header: &Header) -> Stamp {
    Stamp {
        pid: Pid(header.tgid),
        tid: Tid(header.tid),
        epoch: Epoch(header.epoch),
        time: BootNanos(header.time),
        lost: header.lost,
    }
}

/// Decodes a record of the ring buffer `EVENTS`.
pub fn decode(bytes: &[u8]) -> Result<Event, DecodeError> {
    let (header, _) = head::<Header>(bytes)?;
    let stamp = stamp(&header);
    match header.kind {
        event::ENTER => {
            let (record, rest) = head::<CallEnter>(bytes)?;
            Ok(Event::Enter {
                stamp,
                probe: ProbeId(record.probe),
                depth: record.depth,
                recursion: record.flags & enter_flags::RECURSION != 0,
                object: UserAddr(record.object),
                fields: fields(rest, record.fields)?,
            })
        }
        event::RETURN => {
            let (record, rest) = head::<CallReturn>(bytes)?;
            Ok(Event::Return {
                stamp,
                call: BootNanos(record.call),
                probe: ProbeId(record.probe),
                outcome: if record.outcome == outcome::RAISED { Outcome::Raised } else { Outcome::Returned },
                object: UserAddr(record.object),
                fields: fields(rest, record.fields)?,
            })
        }
        event::FORK => {
            let (record, _) = head::<ProcessEvent>(bytes)?;
            Ok(Event::Fork { stamp, child: Pid(record.other), child_epoch: Epoch(record.other_epoch) })
        }
        event::EXEC => Ok(Event::Exec { stamp }),
        event::EXIT => {
            let (record, _) = head::<ProcessEvent>(bytes)?;
            Ok(Event::Exit { stamp, process_ended: record.other != 0, code: record.code as u32 })
        }
        _ => Err(DecodeError { what: "unknown kind", len: bytes.len() }),
    }
}

/// Decodes a record of the ring buffer `URGENT`.
pub fn decode_urgent(bytes: &[u8]) -> Result<Urgent, DecodeError> {
    Ok(head::<Urgent>(bytes)?.0)
}

/// The captured fields behind a record's head.
fn fields(bytes: &[u8], len: u32) -> Result<Vec<FieldValue>, DecodeError> {
    let error = |what| DecodeError { what, len: bytes.len() };
    let mut rest = bytes.get(..len as usize).ok_or_else(|| error("fewer bytes than its fields"))?;
    let mut fields = Vec::new();
    while rest.len() >= size_of::<Field>() {
        let (field, behind) = head::<Field>(rest)?;
        let payload = behind.get(..field.len as usize).ok_or_else(|| error("a field longer than the record"))?;
        let value = match field.kind {
            value::UTF8 | value::LATIN1 | value::UCS2 | value::UCS4 => {
                Value::Str { text: text(field.kind, payload), cut: field.cut != 0 }
            }
            value::INT => Value::Int(i64::from_le_bytes(eight(payload).ok_or_else(|| error("a short int"))?)),
            value::FLOAT => Value::Float(f64::from_le_bytes(eight(payload).ok_or_else(|| error("a short float"))?)),
            value::BOOL => Value::Bool(payload.first() == Some(&1)),
            value::NONE => Value::None,
            _ => return Err(error("a field of unknown kind")),
        };
        fields.push(FieldValue { field: field.field, value, cut: field.cut != 0 });
        rest = behind.get((field.len as usize).next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(fields)
}

fn eight(payload: &[u8]) -> Option<[u8; 8]> {
    payload.get(..8)?.try_into().ok()
}

/// Text in one of CPython's representations (PEP 393). Lone surrogates, which a str may hold, become U+FFFD.
fn text(kind: u8, payload: &[u8]) -> String {
    match kind {
        value::LATIN1 => payload.iter().map(|&b| char::from(b)).collect(),
        value::UCS2 => payload
            .chunks_exact(2)
            .map(|c| char::from_u32(u32::from(u16::from_le_bytes([c[0], c[1]]))).unwrap_or(char::REPLACEMENT_CHARACTER))
            .collect(),
        value::UCS4 => payload
            .chunks_exact(4)
            .map(|c| {
                char::from_u32(u32::from_le_bytes([c[0], c[1], c[2], c[3]])).unwrap_or(char::REPLACEMENT_CHARACTER)
            })
            .collect(),
        _ => String::from_utf8_lossy(payload).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(fields: &[u8]) -> Vec<u8> {
        let header = Header { kind: event::ENTER, flags: 0, lost: 2, tgid: 7, tid: 8, epoch: 3, time: 99 };
        let enter = CallEnter { header, probe: 5, depth: 1, fields: fields.len() as u32, flags: 0, object: 64 };
        let mut bytes = bytemuck::bytes_of(&enter).to_vec();
        bytes.extend_from_slice(fields);
        bytes
    }

    fn field(number: u8, kind: u8, payload: &[u8]) -> Vec<u8> {
        let field = Field { field: number, kind, cut: 0, reserved: 0, len: payload.len() as u32 };
        let mut bytes = bytemuck::bytes_of(&field).to_vec();
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_enter_record_with_every_kind_of_value_decodes() {
        let mut bytes = field(0, value::UTF8, b"abc");
        bytes.extend(field(1, value::LATIN1, &[0xe9]));
        bytes.extend(field(2, value::UCS2, &[0xac, 0x20]));
        bytes.extend(field(3, value::UCS4, &[0x00, 0xf6, 0x01, 0x00]));
        bytes.extend(field(4, value::INT, &(-5i64).to_le_bytes()));
        bytes.extend(field(5, value::FLOAT, &1.5f64.to_le_bytes()));
        bytes.extend(field(6, value::BOOL, &1u64.to_le_bytes()));
        bytes.extend(field(7, value::NONE, &[]));
        let Event::Enter { stamp, probe, object, fields, .. } = decode(&record(&bytes)).expect("decodes") else {
            panic!("not an enter event");
        };
        assert_eq!((stamp.pid, stamp.tid, stamp.lost, probe), (Pid(7), Tid(8), 2, ProbeId(5)));
        assert_eq!(object, UserAddr(64));
        let text = |text: &str| Value::Str { text: text.into(), cut: false };
        let values: Vec<_> = fields.into_iter().map(|f| f.value).collect();
        assert_eq!(
            values,
            [
                text("abc"),
                text("é"),
                text("€"),
                text("😀"),
                Value::Int(-5),
                Value::Float(1.5),
                Value::Bool(true),
                Value::None
            ]
        );
    }

    #[test]
    fn no_cut_of_a_record_makes_the_decoder_panic() {
        let bytes = record(&field(0, value::UTF8, b"some text"));
        for len in 0..bytes.len() {
            let _ = decode(&bytes[..len]);
        }
        for i in 0..bytes.len() {
            for byte in [0, 0x7f, 0xff] {
                let mut bytes = bytes.clone();
                bytes[i] = byte;
                let _ = decode(&bytes);
            }
        }
    }
}
