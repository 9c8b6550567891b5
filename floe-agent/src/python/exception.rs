//! Exceptions, read while their thread waits with the GIL held.
//!
//! What comes out is what `traceback.format_exception` gives, without source lines and the marks below them: the agent does
//! not open files that a traced process names. No code runs in the process, so a `__str__` or `__repr__` written in Python
//! is not run either; the arguments of the exception stand in for it.

use std::fmt::Write as _;

use super::objects::{Heap, ObjectError, Text, type_flags};
use crate::units::UserAddr;

/// Exceptions that are printed of a chain of causes.
const MAX_CHAIN: usize = 16;
/// Frames of a traceback that are followed.
const MAX_FRAMES: usize = 4096;
/// Lines of a traceback that are printed: of more, these at the beginning and the rest at the end.
const MAX_LINES: usize = 256;
const FIRST_LINES: usize = 64;
/// Frames with the same line that are printed (`traceback._RECURSIVE_CUTOFF`).
const REPETITIONS: usize = 3;
/// Exceptions of a group that are printed, and groups within groups (`traceback.TracebackException`).
const MAX_GROUP_WIDTH: usize = 15;
const MAX_GROUP_DEPTH: usize = 10;
/// Longest text of a message, in characters.
const MAX_TEXT: usize = 4096;
/// Longest stack trace, in bytes; its beginning is left out beyond that.
const MAX_STACKTRACE: usize = 32 << 10;
/// Items of a container in a message, containers within containers.
const MAX_ITEMS: usize = 64;
const MAX_DEPTH: usize = 4;
/// Most notes of an exception.
const MAX_NOTES: usize = 64;
/// Longest location table of a code object.
const MAX_TABLE: usize = 1 << 20;

type Result<T> = std::result::Result<T, ObjectError>;

/// What is known of an exception.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExceptionFacts {
    /// Its type as Python prints it: with its module, unless that is `builtins` or `__main__`.
    pub type_name: String,
    /// What `str` gives for it, where that can be known without running code.
    pub message: Option<String>,
    /// The traceback as Python prints it, causes included, without source lines.
    pub stacktrace: String,
}

/// The exception that is leaving a function of the thread that holds the GIL; `tstate` is where the pointer to its state is.
/// Nothing if there is none, or if it only ends the program as it should.
pub fn raised(heap: &Heap<'_>, tstate: UserAddr) -> Result<Option<ExceptionFacts>> {
    let l = &heap.layout.thread;
    let tstate = heap.mem.read_ptr(tstate)?;
    if tstate.is_null() {
        return Ok(None);
    }
    let value = heap.mem.read_ptr(tstate.offset(l.exception))?;
    match l.exception_type {
        None => match Exception::of(heap, value, None)? {
            Some(exception) => exception.facts(heap),
            None => Ok(None),
        },
        // Type, value and traceback side by side; the value may not be an instance of the type yet.
        Some(at) => {
            let type_ = heap.mem.read_ptr(tstate.offset(at))?;
            let traceback = heap.mem.read_ptr(tstate.offset(l.exception + 8))?;
            Exception::of_parts(heap, type_, value, traceback)
        }
    }
}

/// The exception that comes into a call whose arguments are at `args`: the one behind the first, or, of an `__exit__`, the
/// type there, and value and traceback behind it.
pub fn passed(heap: &Heap<'_>, args: UserAddr) -> Result<Option<ExceptionFacts>> {
    let argument = |number: u64| heap.mem.read_ptr(args.offset(8 * number));
    let first = argument(1)?;
    if let Some(exception) = Exception::of(heap, first, None)? {
        return exception.facts(heap);
    }
    let none_is_null = |object: UserAddr| if object == heap.types.none { UserAddr(0) } else { object };
    Exception::of_parts(heap, first, none_is_null(argument(2)?), none_is_null(argument(3)?))
}

/// An exception, normalised or not.
#[derive(Clone, Copy)]
struct Exception {
    type_: UserAddr,
    /// The instance, where it has been made.
    object: Option<UserAddr>,
    /// What the instance will be made of, where it has not.
    value: UserAddr,
    traceback: UserAddr,
}

impl Exception {
    /// An instance, with its own traceback unless another one is given.
    fn of(heap: &Heap<'_>, object: UserAddr, traceback: Option<UserAddr>) -> Result<Option<Self>> {
        if object.is_null() || object == heap.types.none || !heap.has_flag(object, type_flags::EXCEPTION)? {
            return Ok(None);
        }
        let own = heap.mem.read_ptr(object.offset(heap.layout.exception.traceback))?;
        let traceback = traceback.filter(|given| !given.is_null()).unwrap_or(own);
        Ok(Some(Self { type_: heap.type_of(object)?, object: Some(object), value: object, traceback }))
    }

    fn of_parts(
        heap: &Heap<'_>,
        type_: UserAddr,
        value: UserAddr,
        traceback: UserAddr,
    ) -> Result<Option<ExceptionFacts>> {
        if !value.is_null()
            && let Some(exception) = Self::of(heap, value, Some(traceback))?
        {
            return exception.facts(heap);
        }
        if type_.is_null() || type_ == heap.types.none || !heap.is_type(type_)? {
            return Ok(None);
        }
        Self { type_, object: None, value, traceback }.facts(heap)
    }

    /// Nothing if it ends the program as it should.
    fn facts(self, heap: &Heap<'_>) -> Result<Option<ExceptionFacts>> {
        let mut printer = Printer { heap, text: String::new(), depth: 0, need_close: false, seen: Vec::new() };
        let message = printer.message(self);
        let type_name = printer.type_name(self.type_)?;
        if type_name == "SystemExit" {
            let code = if self.object.is_some() { self.own_field(heap, 0) } else { Some(self.value) };
            let code = code.filter(|code| !code.is_null() && *code != heap.types.none);
            if code.is_none_or(|code| heap.int(code) == Ok(0)) {
                return Ok(None);
            }
        }
        printer.chain(self);
        let mut stacktrace = printer.text;
        if stacktrace.len() > MAX_STACKTRACE {
            let mut from = stacktrace.len() - MAX_STACKTRACE;
            while !stacktrace.is_char_boundary(from) {
                from += 1;
            }
            let line = stacktrace[from..].find('\n').map_or(from, |end| from + end + 1);
            stacktrace = format!("[the beginning is left out]\n{}", &stacktrace[line..]);
        }
        Ok(Some(ExceptionFacts { type_name, message, stacktrace }))
    }

    fn field(self, heap: &Heap<'_>, offset: u64) -> Option<UserAddr> {
        let object = self.object?;
        heap.mem.read_ptr(object.offset(offset)).ok().filter(|field| !field.is_null())
    }

    /// A field of a subclass's struct, by its number.
    fn own_field(self, heap: &Heap<'_>, number: u64) -> Option<UserAddr> {
        self.field(heap, heap.layout.exception.fields + 8 * number)
    }

    fn some_field(self, heap: &Heap<'_>, number: u64) -> Option<UserAddr> {
        self.own_field(heap, number).filter(|&field| field != heap.types.none)
    }

    fn args(self, heap: &Heap<'_>) -> Vec<UserAddr> {
        if let Some(args) = self.field(heap, heap.layout.exception.args) {
            return heap.tuple(args).unwrap_or_default();
        }
        if self.object.is_some() || self.value.is_null() || self.value == heap.types.none {
            return Vec::new();
        }
        heap.tuple(self.value).unwrap_or_else(|_| vec![self.value])
    }
}

/// Which `__str__` a class has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Printed {
    /// `BaseException`'s: the arguments.
    Arguments,
    /// One that is written in Python.
    Own,
    KeyError,
    OsError,
    ImportError,
    SyntaxError,
    UnicodeDecodeError,
    UnicodeEncodeError,
    Group,
}

struct Printer<'a, 'm> {
    heap: &'a Heap<'m>,
    text: String,
    /// Of exception groups.
    depth: usize,
    need_close: bool,
    /// Exceptions that were met.
    seen: Vec<UserAddr>,
}

impl Printer<'_, '_> {
    /// As `traceback.TracebackException.format`.
    fn chain(&mut self, exception: Exception) {
        const CAUSE: &str = "\nThe above exception was the direct cause of the following exception:\n\n";
        const CONTEXT: &str = "\nDuring handling of the above exception, another exception occurred:\n\n";
        let layout = &self.heap.layout.exception;
        let mut chain = vec![(exception, None)];
        self.seen.extend(exception.object);
        while chain.len() < MAX_CHAIN {
            let (this, _) = chain[chain.len() - 1];
            let cause = this.field(self.heap, layout.cause);
            let suppressed = this
                .object
                .is_some_and(|object| self.heap.mem.read_u8(object.offset(layout.suppress_context)).unwrap_or(0) != 0);
            let (next, why) = match (cause, suppressed) {
                (Some(cause), _) => (Some(cause), CAUSE),
                (None, false) => (this.field(self.heap, layout.context), CONTEXT),
                (None, true) => (None, ""),
            };
            let Some(next) = next.filter(|next| !self.seen.contains(next)) else { break };
            let Ok(Some(next)) = Exception::of(self.heap, next, None) else { break };
            self.seen.extend(next.object);
            chain.push((next, None));
            let last = chain.len() - 2;
            chain[last].1 = Some(why);
        }
        for (exception, why) in chain.into_iter().rev() {
            if let Some(why) = why {
                self.emit(why, '|');
            }
            let group = self.group(exception);
            match group {
                None => {
                    self.traceback(exception.traceback, "Traceback (most recent call last):\n", '|');
                    self.only(exception);
                }
                Some(members) => self.members(exception, &members),
            }
        }
    }

    /// The exceptions of a group.
    fn group(&self, exception: Exception) -> Option<Vec<UserAddr>> {
        if self.printed(exception.type_, true) != Printed::Group {
            return None;
        }
        let members = self.heap.tuple(exception.own_field(self.heap, 1)?).ok()?;
        Some(members)
    }

    fn members(&mut self, exception: Exception, members: &[UserAddr]) {
        if self.depth > MAX_GROUP_DEPTH {
            let text = format!("... (max_group_depth is {MAX_GROUP_DEPTH})\n");
            self.emit(&text, '|');
            return;
        }
        let top = self.depth == 0;
        self.depth += usize::from(top);
        let margin = if top { '+' } else { '|' };
        self.traceback(exception.traceback, "Exception Group Traceback (most recent call last):\n", margin);
        self.only(exception);
        let shown = members.len().min(MAX_GROUP_WIDTH + 1);
        self.need_close = false;
        for (index, &member) in members.iter().enumerate().take(shown) {
            let last = index + 1 == shown;
            self.need_close |= last;
            let left_out = index >= MAX_GROUP_WIDTH;
            let title = if left_out { "...".to_owned() } else { (index + 1).to_string() };
            let indent = "  ".repeat(self.depth);
            let edge = if index == 0 { "+-" } else { "  " };
            let _ = writeln!(self.text, "{indent}{edge}+---------------- {title} ----------------");
            self.depth += 1;
            if left_out {
                let more = members.len() - MAX_GROUP_WIDTH;
                let text = format!("and {more} more exception{}\n", if more > 1 { "s" } else { "" });
                self.emit(&text, '|');
            } else if let Ok(Some(member)) = Exception::of(self.heap, member, None) {
                self.chain(member);
            }
            if last && self.need_close {
                let indent = "  ".repeat(self.depth);
                let _ = writeln!(self.text, "{indent}+------------------------------------");
                self.need_close = false;
            }
            self.depth -= 1;
        }
        self.depth -= usize::from(top);
    }

    /// Adds text, in a group behind its margin.
    fn emit(&mut self, text: &str, margin: char) {
        if self.depth == 0 {
            self.text += text;
            return;
        }
        let indent = "  ".repeat(self.depth);
        for line in text.split_inclusive('\n') {
            let _ = write!(self.text, "{indent}{margin} {line}");
        }
    }

    /// The frames of a traceback, under a title, if there is one.
    fn traceback(&mut self, traceback: UserAddr, title: &str, margin: char) {
        if traceback.is_null() {
            return;
        }
        let lines = frames(self.heap, traceback);
        self.emit(title, margin);
        let lines = repeated(&lines);
        for (index, line) in lines.iter().enumerate() {
            let left_out = lines.len().saturating_sub(MAX_LINES);
            if left_out > 0 && index == FIRST_LINES {
                let text = format!("  [{left_out} lines are left out]\n");
                self.emit(&text, '|');
            }
            if left_out == 0 || index < FIRST_LINES || index >= FIRST_LINES + left_out {
                self.emit(line, '|');
            }
        }
    }

    /// The last lines: type, message and notes. As `format_exception_only`.
    fn only(&mut self, exception: Exception) {
        let type_name = self.type_name(exception.type_).unwrap_or_else(|_| "<unknown>".to_owned());
        let mut message = self.message(exception).unwrap_or_default();
        if exception.object.is_some() && self.descends_from_syntax_error(exception.type_) {
            let text = |number| exception.some_field(self.heap, number).map(|field| self.show(field, false, 0));
            message = text(0).unwrap_or_else(|| "<no detail available>".to_owned());
            let (file, line) = (text(1), text(2));
            match (file, line) {
                (file, Some(line)) => {
                    let file = file.unwrap_or_else(|| "<string>".to_owned());
                    let text = format!("  File \"{file}\", line {line}\n");
                    self.emit(&text, '|');
                }
                (Some(file), None) => message = format!("{message} ({file})"),
                (None, None) => {}
            }
        }
        let line = if message.is_empty() { format!("{type_name}\n") } else { format!("{type_name}: {message}\n") };
        self.emit(&line, '|');
        for note in self.notes(exception) {
            for line in note.split('\n') {
                self.emit(&format!("{line}\n"), '|');
            }
        }
    }

    fn notes(&self, exception: Exception) -> Vec<String> {
        if !self.heap.layout.exception.notes {
            return Vec::new();
        }
        let Some(notes) =
            exception.object.and_then(|object| self.heap.instance_attribute(object, "__notes__").ok().flatten())
        else {
            return Vec::new();
        };
        let items = self.heap.list(notes).or_else(|_| self.heap.tuple(notes)).unwrap_or_default();
        items.into_iter().take(MAX_NOTES).map(|note| self.show(note, false, 0)).collect()
    }

    /// The qualified name of a type, as it is printed.
    fn type_name(&self, type_: UserAddr) -> Result<String> {
        let (module, name) = self.qualified(type_)?;
        Ok(match module.as_deref() {
            None | Some("builtins" | "__main__") => name,
            Some(module) => format!("{module}.{name}"),
        })
    }

    /// `__module__` and `__qualname__` of a type.
    fn qualified(&self, type_: UserAddr) -> Result<(Option<String>, String)> {
        let info = self.heap.type_info(type_)?;
        let name = self.heap.type_name(type_)?;
        if info.flags & type_flags::HEAPTYPE == 0 {
            return Ok(match name.rsplit_once('.') {
                Some((module, name)) => (Some(module.to_owned()), name.to_owned()),
                None => (None, name),
            });
        }
        let qualname = self.heap.mem.read_ptr(type_.offset(self.heap.layout.type_.qualname))?;
        let qualname = self.heap.name(qualname).unwrap_or(name);
        let module = if info.dict.is_null() { None } else { self.heap.dict_get(info.dict, "__module__")? };
        Ok((module.and_then(|module| self.heap.name(module).ok()), qualname))
    }

    /// Which `__str__` instances of a type have; `built_in`: of those only that are not written in Python.
    fn printed(&self, type_: UserAddr, built_in: bool) -> Printed {
        let Ok(info) = self.heap.type_info(type_) else { return Printed::Arguments };
        for class in self.heap.mro(&info).unwrap_or_default() {
            let Ok(info) = self.heap.type_info(class) else { break };
            if info.flags & type_flags::HEAPTYPE != 0 {
                // ExceptionGroup itself is made at run time, without a `__str__` of its own.
                if !built_in && !info.dict.is_null() && matches!(self.heap.dict_get(info.dict, "__str__"), Ok(Some(_)))
                {
                    return Printed::Own;
                }
                continue;
            }
            match self.heap.type_name(class).as_deref() {
                Ok("KeyError") => return Printed::KeyError,
                Ok("OSError") => return Printed::OsError,
                Ok("ImportError") => return Printed::ImportError,
                Ok("SyntaxError") => return Printed::SyntaxError,
                Ok("UnicodeDecodeError") => return Printed::UnicodeDecodeError,
                Ok("UnicodeEncodeError") => return Printed::UnicodeEncodeError,
                Ok("BaseExceptionGroup") => return Printed::Group,
                Ok("BaseException") => break,
                _ => {}
            }
        }
        Printed::Arguments
    }

    fn descends_from_syntax_error(&self, type_: UserAddr) -> bool {
        self.printed(type_, true) == Printed::SyntaxError
    }

    /// `str` of an exception.
    fn message(&self, exception: Exception) -> Option<String> {
        let args = exception.args(self.heap);
        let arguments = || match &args[..] {
            [] => None,
            &[one] => Some(self.show(one, false, 0)),
            many => Some(self.show_items(many, "(", ")", 0)),
        };
        let field = |number| exception.some_field(self.heap, number);
        let text = |object| self.show(object, false, 0);
        match self.printed(exception.type_, false) {
            Printed::Arguments => arguments(),
            Printed::Own => {
                let attribute = |name| self.heap.instance_attribute(exception.object?, name).ok()?;
                let said = || {
                    let message = ["message", "msg"].into_iter().find_map(attribute)?;
                    self.heap.is_str(message).ok()?.then(|| text(message))
                };
                // Of one argument, or of several what says of itself that it is the message.
                if args.len() == 1 { arguments() } else { said().or_else(arguments) }
            }
            Printed::KeyError => match &args[..] {
                &[key] => Some(self.show(key, true, 0)),
                _ => arguments(),
            },
            Printed::OsError => {
                let or_none = |object: Option<UserAddr>| object.map_or_else(|| "None".to_owned(), text);
                // NULL where it was not given.
                let number = exception.own_field(self.heap, 0);
                let reason = exception.own_field(self.heap, 1);
                match (exception.own_field(self.heap, 2), exception.own_field(self.heap, 3)) {
                    (Some(file), other) => {
                        let files: Vec<_> =
                            [Some(file), other].into_iter().flatten().map(|file| self.show(file, true, 0)).collect();
                        Some(format!("[Errno {}] {}: {}", or_none(number), or_none(reason), files.join(" -> ")))
                    }
                    _ => match (number, reason) {
                        (Some(number), Some(reason)) => Some(format!("[Errno {}] {}", text(number), text(reason))),
                        _ => arguments(),
                    },
                }
            }
            Printed::ImportError => match field(0) {
                Some(message) if self.heap.is_str(message).unwrap_or(false) => Some(text(message)),
                _ => arguments(),
            },
            Printed::SyntaxError => {
                let message = exception.own_field(self.heap, 0).map_or_else(|| "None".to_owned(), text);
                let file = field(1).map(text).map(|file| file.rsplit('/').next().unwrap_or_default().to_owned());
                Some(match (file, field(2).map(text)) {
                    (Some(file), Some(line)) => format!("{message} ({file}, line {line})"),
                    (Some(file), None) => format!("{message} ({file})"),
                    (None, Some(line)) => format!("{message} (line {line})"),
                    (None, None) => message,
                })
            }
            Printed::UnicodeDecodeError | Printed::UnicodeEncodeError => self.codec(exception).or_else(arguments),
            Printed::Group => {
                let count = self.group(exception).unwrap_or_default().len();
                let plural = if count == 1 { "" } else { "s" };
                Some(format!("{} ({count} sub-exception{plural})", text(exception.own_field(self.heap, 0)?)))
            }
        }
    }

    /// `str` of a UnicodeDecodeError or UnicodeEncodeError.
    fn codec(&self, exception: Exception) -> Option<String> {
        let base = exception.object?.offset(self.heap.layout.exception.fields);
        let encoding = self.show(exception.own_field(self.heap, 0)?, false, 0);
        let object = exception.own_field(self.heap, 1)?;
        let start = usize::try_from(self.heap.mem.read_u64(base.offset(16)).ok()?).ok()?;
        let end = usize::try_from(self.heap.mem.read_u64(base.offset(24)).ok()?).ok()?;
        let reason = self.show(exception.own_field(self.heap, 4)?, false, 0);
        let last = end.checked_sub(1)?;
        let decode = self.heap.has_flag(object, type_flags::BYTES).ok()?;
        let what = if decode { "decode" } else { "encode" };
        if start != last || start > 1 << 20 {
            let things = if decode { "bytes" } else { "characters" };
            return Some(format!("'{encoding}' codec can't {what} {things} in position {start}-{last}: {reason}"));
        }
        let thing = if decode {
            format!("byte 0x{:02x}", self.heap.bytes(object, 1 << 20).ok()?.get(start)?)
        } else {
            let code = u32::from(self.heap.text(object, start + 1).ok()?.text.chars().nth(start)?);
            match code {
                0..=0xff => format!("character '\\x{code:02x}'"),
                0x100..=0xffff => format!("character '\\u{code:04x}'"),
                _ => format!("character '\\U{code:08x}'"),
            }
        };
        Some(format!("'{encoding}' codec can't {what} {thing} in position {start}: {reason}"))
    }

    /// `str` or `repr` of a value, where that can be known.
    fn show(&self, object: UserAddr, repr: bool, depth: usize) -> String {
        self.try_show(object, repr, depth).unwrap_or_else(|_| "<unreadable>".to_owned())
    }

    fn try_show(&self, object: UserAddr, repr: bool, depth: usize) -> Result<String> {
        let heap = self.heap;
        if object == heap.types.none {
            return Ok("None".to_owned());
        }
        let type_ = heap.type_of(object)?;
        let flags = heap.mem.read_u64(type_.offset(heap.layout.type_.flags))?;
        if flags & type_flags::STR != 0 {
            let Text { mut text, cut } = heap.text(object, MAX_TEXT)?;
            if cut {
                text += "...";
            }
            return Ok(if repr { repr_of_str(&text) } else { text });
        }
        if flags & type_flags::LONG != 0
            && let Ok(int) = heap.int(object)
        {
            return Ok(match (type_ == heap.types.bool, int) {
                (true, 0) => "False".to_owned(),
                (true, _) => "True".to_owned(),
                (false, int) => int.to_string(),
            });
        }
        if type_ == heap.types.float {
            return Ok(repr_of_float(heap.float(object)?));
        }
        if flags & type_flags::BYTES != 0 {
            return Ok(repr_of_bytes(&heap.bytes(object, MAX_TEXT)?));
        }
        let plain = flags & type_flags::HEAPTYPE == 0;
        if plain && depth < MAX_DEPTH {
            if flags & type_flags::TUPLE != 0 {
                return Ok(self.show_items(&heap.tuple(object)?, "(", ")", depth));
            }
            if flags & type_flags::LIST != 0 {
                return Ok(self.show_items(&heap.list(object)?, "[", "]", depth));
            }
            if flags & type_flags::DICT != 0 && heap.type_name(type_)? == "dict" {
                let mut items = Vec::new();
                for (key, value) in heap.dict(object)?.into_iter().take(MAX_ITEMS) {
                    items.push(format!("{}: {}", self.show(key, true, depth + 1), self.show(value, true, depth + 1)));
                }
                return Ok(format!("{{{}}}", items.join(", ")));
            }
        }
        if flags & type_flags::TYPE != 0 {
            let (module, name) = self.qualified(object)?;
            return Ok(match module.as_deref() {
                None | Some("builtins") => format!("<class '{name}'>"),
                Some(module) => format!("<class '{module}.{name}'>"),
            });
        }
        if flags & type_flags::EXCEPTION != 0
            && depth < MAX_DEPTH
            && let Some(exception) = Exception::of(heap, object, None)?
        {
            if !repr {
                return Ok(self.message(exception).unwrap_or_default());
            }
            let (_, name) = self.qualified(type_)?;
            let name = name.rsplit('.').next().unwrap_or_default();
            return Ok(match &exception.args(heap)[..] {
                &[one] => format!("{name}({})", self.show(one, true, depth + 1)),
                many => format!("{name}{}", self.show_items(many, "(", ")", depth)),
            });
        }
        let (module, name) = self.qualified(type_)?;
        let module = module.unwrap_or_else(|| "builtins".to_owned());
        Ok(format!("<{module}.{name} object at {object}>"))
    }

    /// `repr` of a tuple or list.
    fn show_items(&self, items: &[UserAddr], open: &str, close: &str, depth: usize) -> String {
        let mut shown: Vec<_> = items.iter().take(MAX_ITEMS).map(|&item| self.show(item, true, depth + 1)).collect();
        if items.len() > MAX_ITEMS {
            shown.push("...".to_owned());
        }
        let comma = if open == "(" && items.len() == 1 { "," } else { "" };
        format!("{open}{}{comma}{close}", shown.join(", "))
    }
}

/// The lines of a traceback, outermost first.
fn frames(heap: &Heap<'_>, traceback: UserAddr) -> Vec<String> {
    let l = &heap.layout.exception;
    let mut lines = Vec::new();
    let mut next = traceback;
    let Ok(type_) = heap.type_of(traceback) else { return lines };
    if heap.type_name(type_).as_deref() != Ok("traceback") {
        return lines;
    }
    while !next.is_null() && lines.len() < MAX_FRAMES && heap.type_of(next) == Ok(type_) {
        lines.push(line(heap, next).unwrap_or_else(|_| "  File \"<unreadable>\"\n".to_owned()));
        match heap.mem.read_ptr(next.offset(l.tb_next)) {
            Ok(address) => next = address,
            Err(_) => break,
        }
    }
    lines
}

fn line(heap: &Heap<'_>, traceback: UserAddr) -> Result<String> {
    let l = &heap.layout.exception;
    let mut frame = heap.mem.read_ptr(traceback.offset(l.tb_frame))?;
    if let Some(inner) = l.frame_inner {
        frame = heap.mem.read_ptr(frame.offset(inner))?;
    }
    // 3.14 marks pointers in their low bits.
    let code = UserAddr(heap.mem.read_u64(frame.offset(l.frame_code))? & !7);
    let (file, name) = heap.code_place(code)?;
    let number = heap.mem.read_i32(traceback.offset(l.tb_lineno))?;
    let number = if number >= 0 {
        Some(i64::from(number))
    } else {
        let last = heap.mem.read_i32(traceback.offset(l.tb_lasti))?;
        let (first, table) = heap.code_lines(code, MAX_TABLE)?;
        line_at(&table, first, last)
    };
    let number = number.map_or_else(|| "None".to_owned(), |number| number.to_string());
    Ok(format!("  File \"{file}\", line {number}, in {name}\n"))
}

/// As `traceback.StackSummary.format` does with frames that repeat.
fn repeated(lines: &[String]) -> Vec<String> {
    let mut shown = Vec::new();
    let note = |shown: &mut Vec<String>, count: usize| {
        if count > REPETITIONS {
            let more = count - REPETITIONS;
            let plural = if more > 1 { "s" } else { "" };
            shown.push(format!("  [Previous line repeated {more} more time{plural}]\n"));
        }
    };
    let mut count = 0;
    for (index, line) in lines.iter().enumerate() {
        if index == 0 || *line != lines[index - 1] {
            note(&mut shown, count);
            count = 0;
        }
        count += 1;
        if count <= REPETITIONS {
            shown.push(line.clone());
        }
    }
    note(&mut shown, count);
    shown
}

/// The line of an instruction by a location table (3.11 on; Objects/locations.md): `lasti` is in bytes.
fn line_at(table: &[u8], first: i32, lasti: i32) -> Option<i64> {
    let Ok(wanted) = u64::try_from(lasti) else { return Some(first.into()) };
    let mut bytes = table.iter().copied();
    let mut line = i64::from(first);
    let mut end = 0;
    loop {
        let head = bytes.next()?;
        let code = head >> 3 & 15;
        end += 2 * (u64::from(head & 7) + 1);
        line += match code {
            // No column, and the long form: a signed number of variable length.
            13 | 14 => signed(&mut bytes)?,
            10..=12 => i64::from(code) - 10,
            _ => 0,
        };
        let behind = match code {
            0..=9 => 1,
            10..=12 => 2,
            14 => {
                for _ in 0..3 {
                    unsigned(&mut bytes)?;
                }
                0
            }
            _ => 0,
        };
        for _ in 0..behind {
            bytes.next()?;
        }
        if wanted < end {
            return (code != 15).then_some(line);
        }
    }
}

fn unsigned(bytes: &mut impl Iterator<Item = u8>) -> Option<u64> {
    let mut number = 0;
    for shift in (0..60).step_by(6) {
        let byte = bytes.next()?;
        number |= u64::from(byte & 0x3f) << shift;
        if byte & 0x40 == 0 {
            return Some(number);
        }
    }
    None
}

fn signed(bytes: &mut impl Iterator<Item = u8>) -> Option<i64> {
    let number = unsigned(bytes)?;
    let magnitude = (number >> 1).cast_signed();
    Some(if number & 1 == 0 { magnitude } else { -magnitude })
}

fn repr_of_str(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut repr = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => repr += "\\\\",
            '\n' => repr += "\\n",
            '\r' => repr += "\\r",
            '\t' => repr += "\\t",
            c if c == quote => {
                repr.push('\\');
                repr.push(c);
            }
            ' '..='~' => repr.push(c),
            c if is_printable(c) => repr.push(c),
            c => {
                let code = u32::from(c);
                let _ = match code {
                    0..=0xff => write!(repr, "\\x{code:02x}"),
                    0x100..=0xffff => write!(repr, "\\u{code:04x}"),
                    _ => write!(repr, "\\U{code:08x}"),
                };
            }
        }
    }
    repr.push(quote);
    repr
}

/// Nearly `str.isprintable`: controls, separators, and the most common format characters are not.
fn is_printable(c: char) -> bool {
    !(c.is_control()
        || c.is_whitespace()
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{e000}'..='\u{f8ff}'))
}

fn repr_of_bytes(bytes: &[u8]) -> String {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { '"' } else { '\'' };
    let mut repr = format!("b{quote}");
    for &byte in bytes {
        match byte {
            b'\\' => repr += "\\\\",
            b'\n' => repr += "\\n",
            b'\r' => repr += "\\r",
            b'\t' => repr += "\\t",
            byte if char::from(byte) == quote => {
                repr.push('\\');
                repr.push(quote);
            }
            b' '..=b'~' => repr.push(char::from(byte)),
            byte => {
                let _ = write!(repr, "\\x{byte:02x}");
            }
        }
    }
    repr.push(quote);
    repr
}

/// The shortest digits that give the same float, as Python writes them.
fn repr_of_float(float: f64) -> String {
    if !float.is_finite() {
        return if float.is_nan() {
            "nan"
        } else if float > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = float.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_from_the_location_table() {
        // Two units without a line, short form (same line), one-line form (+2), no column (-1), long form (+300), none.
        let table = [
            0x80 | 15 << 3 | 1,
            0x80 | 3 << 3,
            0x55,
            0x80 | 12 << 3 | 2,
            1,
            2,
            0x80 | 13 << 3,
            3,
            0x80 | 14 << 3,
            0x40 | 0x18, // 600: twice 300
            9,
            0,
            1,
            2,
            0x80 | 15 << 3,
        ];
        let line = |lasti| line_at(&table, 10, lasti);
        assert_eq!(line(-1), Some(10));
        assert_eq!((line(0), line(2)), (None, None));
        assert_eq!(line(4), Some(10));
        assert_eq!((line(6), line(8), line(10)), (Some(12), Some(12), Some(12)));
        assert_eq!(line(12), Some(11));
        assert_eq!(line(14), Some(311));
        assert_eq!(line(16), None);
        assert_eq!(line(1000), None);
        for len in 0..table.len() {
            line_at(&table[..len], 1, 40);
        }
        assert_eq!(line_at(&[0xff; 64], 1, 4000), None);
        assert_eq!(line_at(&[0xf7; 64], 1, 4000), None, "numbers without end");
    }

    #[test]
    fn lines_that_repeat_are_counted() {
        let lines = |counts: &[(&str, usize)]| -> Vec<String> {
            counts.iter().flat_map(|&(line, count)| vec![line.to_owned(); count]).collect()
        };
        assert_eq!(repeated(&lines(&[("a", 3), ("b", 1)])), lines(&[("a", 3), ("b", 1)]));
        assert_eq!(repeated(&lines(&[("a", 4)])), lines(&[("a", 3), ("  [Previous line repeated 1 more time]\n", 1)]));
        assert_eq!(
            repeated(&lines(&[("a", 9), ("b", 1)])),
            lines(&[("a", 3), ("  [Previous line repeated 6 more times]\n", 1), ("b", 1)])
        );
        assert_eq!(repeated(&[]), Vec::<String>::new());
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        for (text, repr) in [
            ("a", "'a'"),
            ("it's", "\"it's\""),
            ("\"it's\"", "'\"it\\'s\"'"),
            ("a\n\\\t\0\x7f", "'a\\n\\\\\\t\\x00\\x7f'"),
            ("é€🐍", "'é€🐍'"),
            ("\u{a0}\u{200b}", "'\\xa0\\u200b'"),
        ] {
            assert_eq!(repr_of_str(text), repr);
        }
        assert_eq!(repr_of_bytes(b"a'\xff\n"), "b\"a'\\xff\\n\"");
        for (float, repr) in [
            (1.0, "1.0"),
            (-0.5, "-0.5"),
            (0.0, "0.0"),
            (1e16, "1e+16"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e300, "1.5e+300"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(repr_of_float(float), repr);
        }
    }
}
