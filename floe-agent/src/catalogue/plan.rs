//! From probes to the capture plans that the eBPF programs run.
//!
//! The paths of one probe and moment become one plan. Common beginnings are walked once: each distinct prefix of the
//! paths has its own register, so that `self.node` is loaded once for `self.node.name` and `self.node.schema`.
//!
//! Lists come behind simple values and before what is about an exception: they may be long, and what is long gets the room
//! that is left.

use std::collections::{HashMap, HashSet};

use bytemuck::Zeroable;
use floe_ebpf::{
    CALLERS_HOP, FIXED_KEYS, KEY_LEN, Key, LIBRARY, LIBRARY_REGS, LIST_LEN, LOAD_EXCEPTION_ARGS, LOAD_FUNC_GLOBALS,
    MAX_HOPS, MAX_KEYS, MAX_OPS, MAX_PLANS, MAX_STR, Op, Plan, key, op, routine, value,
};
use thiserror::Error;

use super::path::{Leaf, Path, Root, Step};
use super::probe::{Attribute, Kind, Moment, Probe, Read};

/// Longest captured string unless a pack says otherwise, in bytes of its representation.
pub const DEFAULT_MAX: u32 = 256;

/// Most items of a list, of a dict, and of each list in a list.
pub const MAX_ITEMS: u32 = 64;

/// Longest message of an exception.
const MAX_MESSAGE: u32 = 1020;

/// Name of the field with the type of a raised exception.
pub const EXCEPTION_TYPE: &str = "exception.type";
/// Name of the field with the message of a raised exception.
pub const EXCEPTION_MESSAGE: &str = "exception.message";

/// The plans of all probes.
#[derive(Clone, Debug, Default)]
pub struct Plans {
    /// Key table: `KEYS[i]`.
    pub keys: Vec<Key>,
    /// Plan table: `PLANS[i]`.
    pub plans: Vec<Plan>,
    /// The plans of each probe; the index is the probe's id.
    pub probes: Vec<ProbePlans>,
    /// Hop numbers in use, from 0.
    pub hops: u32,
}

/// The plans of one probe.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProbePlans {
    /// What runs at entry.
    pub enter: Option<PlanRef>,
    /// What runs at return.
    pub exit: Option<PlanRef>,
}

/// A plan and the meaning of its fields.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanRef {
    /// Index into [`Plans::plans`].
    pub number: u32,
    /// Attribute names by field number. Several fields may have one name: the last that has a value wins.
    pub fields: Vec<opentelemetry::Key>,
}

/// Probes that do not fit the kernel side.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// One plan is too long.
    #[error("probe `{probe}`: its attributes at {moment} need {needed} {what}, {limit} are possible: capture fewer")]
    PlanTooLarge {
        /// The probe.
        probe: String,
        /// Enter or exit.
        moment: Moment,
        /// Operations, registers or bytes.
        what: &'static str,
        /// How many it needs.
        needed: usize,
        /// How many there are.
        limit: usize,
    },
    /// All probes together are too many.
    #[error(
        "all probes together need more than {limit} {what}: load fewer packs or probes (the first too many: `{probe}`)"
    )]
    TooMany {
        /// Keys, plans or look-ups.
        what: &'static str,
        /// How many there are.
        limit: u32,
        /// The probe that did not fit.
        probe: String,
    },
    /// A name is too long, or not ASCII.
    #[error("probe `{probe}`: the name `{key}` cannot be looked up: it must have 1 to {} ASCII characters", KEY_LEN - 1)]
    Key {
        /// The probe.
        probe: String,
        /// The name.
        key: String,
    },
}

impl PlanError {
    /// The name of the probe that did not fit.
    pub fn probe(&self) -> &str {
        match self {
            Self::PlanTooLarge { probe, .. } | Self::TooMany { probe, .. } | Self::Key { probe, .. } => probe,
        }
    }
}

/// Compiles the plans of all probes.
pub fn compile(probes: &[Probe]) -> Result<Plans, PlanError> {
    let mut compiler = Compiler::new();
    for probe in probes {
        let enter = compiler.plan(probe, Moment::Enter)?;
        let exit = compiler.plan(probe, Moment::Exit)?;
        compiler.plans.probes.push(ProbePlans { enter, exit });
    }
    Ok(compiler.plans)
}

#[derive(Default)]
struct Compiler {
    plans: Plans,
    key_numbers: HashMap<String, u32>,
}

/// One plan while it is made.
struct Draft<'a> {
    probe: &'a str,
    ops: Vec<Op>,
    fields: Vec<opentelemetry::Key>,
    registers: usize,
    roots: Vec<(Root, u8)>,
    steps: Vec<(u8, Step, u8)>,
    /// Bytes that the simple fields of arguments and result can take.
    bytes: usize,
}

impl Compiler {
    /// With the library and what it needs.
    fn new() -> Self {
        let mut this = Self::default();
        for text in FIXED_KEYS {
            this.key("", text).expect("the fixed keys are short, and few");
        }
        let mut library = Plan::zeroed();
        let mut at = 0;
        let object = LIBRARY_REGS as u8;
        let (made, item) = (object + 1, object + 2);
        let mut emit = |from: u32, ops: &[Op]| {
            assert!(at <= from as usize, "routines do not overlap");
            at = from as usize + ops.len();
            library.ops[from as usize..at].copy_from_slice(ops);
        };
        let attribute = |arg, hop| Op { code: op::ATTR, dst: made, src: object, arg, hop, ..Op::zeroed() };
        let value = Op { code: op::VALUE, src: made, ..Op::zeroed() };
        let unless = |captured: bool| Op { code: op::RETURN, arg: u32::from(captured), ..Op::zeroed() };
        emit(routine::ENUM, &[attribute(key::VALUE, CALLERS_HOP), value, unless(false)]);
        let texts = |first: u32, kind: u8| {
            let max = u32::from(kind) << 16 | MAX_ITEMS;
            [
                Op { code: op::EACH, dst: item, src: made, arg: first + 2, max, ..Op::zeroed() },
                Op { code: op::VALUE, src: item, ..Op::zeroed() },
                Op { code: op::NEXT, dst: item, max, ..Op::zeroed() },
            ]
        };
        let mut path = vec![attribute(key::STR, this.fixed_hop()), value, unless(true)];
        for (key, kind) in [(key::RAW_PATHS, value::RAW_PATH), (key::PARTS, value::PATH_PARTS)] {
            path.push(attribute(key, this.fixed_hop()));
            path.extend(texts(routine::PATH + path.len() as u32, kind));
            path.push(unless(key == key::RAW_PATHS));
        }
        emit(routine::PATH, &path);
        let uuid = Op { code: op::UUID, src: made, ..Op::zeroed() };
        emit(routine::UUID, &[attribute(key::INT, this.fixed_hop()), uuid, unless(false)]);
        library.len = at as u32;
        library.returned = library.len;
        assert_eq!(this.plans.plans.len(), LIBRARY as usize);
        this.plans.plans.push(library);
        this
    }

    fn fixed_hop(&mut self) -> u32 {
        self.hop("").expect("the library needs few")
    }

    fn plan(&mut self, probe: &Probe, moment: Moment) -> Result<Option<PlanRef>, PlanError> {
        let mut draft = Draft {
            probe: &probe.name,
            ops: Vec::new(),
            fields: Vec::new(),
            registers: 0,
            roots: Vec::new(),
            steps: Vec::new(),
            bytes: 0,
        };
        let wanted: Vec<_> = probe.attributes.iter().filter(|attribute| attribute.at == moment).collect();
        // An attribute's alternatives stay together, in their order.
        let lists: HashSet<_> = wanted.iter().filter(|a| a.path.is_long()).map(|a| &a.name).collect();
        for long in [false, true] {
            for Attribute { name, path, at: _, max } in &wanted {
                if lists.contains(name) == long {
                    self.path(&mut draft, name.clone(), path, *max)?;
                }
            }
        }
        let returned = draft.ops.len() as u32;
        if moment == Moment::Exit && (probe.kind != Kind::Event || probe.reads == Some(Read::Raised)) {
            self.exception(&mut draft)?;
        }
        if draft.ops.is_empty() {
            return Ok(None);
        }
        for (what, needed, limit) in [
            ("operations", draft.ops.len(), MAX_OPS),
            ("registers", draft.registers, LIBRARY_REGS),
            ("bytes", draft.bytes, LIST_LEN),
        ] {
            if needed > limit {
                let probe = probe.name.clone();
                return Err(PlanError::PlanTooLarge { probe, moment, what, needed, limit });
            }
        }
        let mut plan = Plan::zeroed();
        plan.len = draft.ops.len() as u32;
        plan.returned = returned;
        plan.ops[..draft.ops.len()].copy_from_slice(&draft.ops);
        let number = self.plans.plans.len() as u32;
        if number >= MAX_PLANS {
            return Err(PlanError::TooMany { what: "plans", limit: MAX_PLANS, probe: probe.name.clone() });
        }
        self.plans.plans.push(plan);
        Ok(Some(PlanRef { number, fields: draft.fields }))
    }

    /// Every plan that runs at the end of a span takes the type and the message of an exception along. Before Python
    /// 3.12 an exception may be raised as a type and its text, not yet made into an object: then the value is a str.
    fn exception(&mut self, draft: &mut Draft<'_>) -> Result<(), PlanError> {
        let name = Path { root: Root::ExceptionType, steps: Vec::new(), leaf: Leaf::TypeName, join: None };
        self.path(draft, opentelemetry::Key::from_static_str(EXCEPTION_TYPE), &name, DEFAULT_MAX)?;
        for steps in [vec![], vec![Step::ExceptionArgs, Step::Item(0)]] {
            let message = Path { root: Root::Exception, steps, leaf: Leaf::Value, join: None };
            self.path(draft, opentelemetry::Key::from_static_str(EXCEPTION_MESSAGE), &message, MAX_MESSAGE)?;
        }
        Ok(())
    }

    fn path(
        &mut self,
        draft: &mut Draft<'_>,
        name: opentelemetry::Key,
        path: &Path,
        max: u32,
    ) -> Result<(), PlanError> {
        // More fields than numbers cannot be: the plan would have too many operations.
        let field = u8::try_from(draft.fields.len()).unwrap_or(u8::MAX);
        let mut register = self.root(draft, &path.root)?;
        let mut loops = Vec::new();
        let innermost = path.steps.iter().rposition(|step| *step == Step::Each);
        for (index, step) in path.steps.iter().enumerate() {
            register = match (step, &path.join) {
                (Step::Each, Some(separator)) if Some(index) == innermost => {
                    let mut bytes = [0; 4];
                    bytes[..separator.len()].copy_from_slice(separator.as_bytes());
                    draft.begin_loop(&mut loops, register, field, value::JOIN, u32::from_le_bytes(bytes))
                }
                (Step::Each, _) => draft.begin_loop(&mut loops, register, field, value::LIST, 0),
                _ => self.step(draft, register, step)?,
            };
        }
        if path.leaf == Leaf::Dict {
            register = draft.begin_loop(&mut loops, register, field, value::MAP, 0);
            // The key is in the register behind the value's, and comes first.
            draft.registers += 1;
            self.leaf(draft, Leaf::Value, register + 1, field, max)?;
        }
        self.leaf(draft, path.leaf, register, field, max)?;
        if loops.is_empty() && matches!(path.root, Root::Argument { .. } | Root::Globals | Root::Return) {
            let size = if path.leaf == Leaf::Len {
                8
            } else if path.leaf == Leaf::Uuid {
                20
            } else {
                (max as usize).max(8).next_multiple_of(4)
            };
            // Sources of one attribute are alternatives: room for one is enough.
            if draft.fields.last() != Some(&name) {
                draft.bytes += size_of::<floe_ebpf::Field>() + size;
            }
        }
        for begin in loops.into_iter().rev() {
            draft.end_loop(begin);
        }
        draft.fields.push(name);
        Ok(())
    }

    fn leaf(&mut self, draft: &mut Draft<'_>, leaf: Leaf, src: u8, field: u8, max: u32) -> Result<(), PlanError> {
        let mut op = Op { src, field, max: max.min(MAX_STR as u32), ..Op::zeroed() };
        match leaf {
            Leaf::Value | Leaf::Dict => {
                op.code = op::VALUE;
                op.hop = self.hop(draft.probe)?;
            }
            Leaf::TypeName => op.code = op::TYPE_NAME,
            Leaf::Len => op.code = op::LEN,
            Leaf::Uuid => op.code = op::UUID,
        }
        draft.ops.push(op);
        Ok(())
    }

    fn root(&mut self, draft: &mut Draft<'_>, root: &Root) -> Result<u8, PlanError> {
        if let Some((_, register)) = draft.roots.iter().find(|(known, _)| known == root) {
            return Ok(*register);
        }
        let mut load = Op::zeroed();
        match root {
            Root::Argument { position, keyword } => {
                load.code = op::ARG;
                load.arg = position.unwrap_or(u32::MAX);
                if let Some(keyword) = keyword {
                    load.hop = self.key(draft.probe, keyword)? + 1;
                }
            }
            Root::Return => load.code = op::RESULT,
            Root::Exception => load.code = op::EXCEPTION,
            Root::ExceptionType => load.code = op::EXCEPTION_TYPE,
            Root::Globals => load.code = op::FUNCTION,
        }
        let mut register = draft.emit(load);
        if *root == Root::Globals {
            register = draft.emit(Op { code: op::LOAD, src: register, arg: LOAD_FUNC_GLOBALS, ..Op::zeroed() });
        }
        draft.roots.push((root.clone(), register));
        Ok(register)
    }

    fn step(&mut self, draft: &mut Draft<'_>, from: u8, step: &Step) -> Result<u8, PlanError> {
        if let Some((_, _, register)) = draft.steps.iter().find(|(source, known, _)| *source == from && known == step) {
            return Ok(*register);
        }
        let mut hop = Op { src: from, ..Op::zeroed() };
        match step {
            Step::Attribute(name) | Step::Key(name) => {
                hop.code = if matches!(step, Step::Attribute(_)) { op::ATTR } else { op::KEY };
                hop.arg = self.key(draft.probe, name)?;
                hop.hop = self.hop(draft.probe)?;
            }
            Step::Item(index) => {
                hop.code = op::ITEM;
                hop.arg = *index;
            }
            Step::ExceptionArgs => {
                hop.code = op::LOAD;
                hop.arg = LOAD_EXCEPTION_ARGS;
            }
            Step::Type => hop.code = op::TYPE,
            Step::Each => unreachable!("loops are not steps of the machine"),
        }
        let register = draft.emit(hop);
        draft.steps.push((from, step.clone(), register));
        Ok(register)
    }

    fn key(&mut self, probe: &str, text: &str) -> Result<u32, PlanError> {
        if let Some(number) = self.key_numbers.get(text) {
            return Ok(*number);
        }
        if text.is_empty() || text.len() >= KEY_LEN || !text.is_ascii() {
            return Err(PlanError::Key { probe: probe.to_owned(), key: text.to_owned() });
        }
        let number = self.plans.keys.len() as u32;
        if number >= MAX_KEYS {
            return Err(PlanError::TooMany { what: "names", limit: MAX_KEYS, probe: probe.to_owned() });
        }
        let mut key = Key::zeroed();
        key.len = text.len() as u64;
        bytemuck::bytes_of_mut(&mut key.text)[..text.len()].copy_from_slice(text.as_bytes());
        self.plans.keys.push(key);
        self.key_numbers.insert(text.to_owned(), number);
        Ok(number)
    }

    fn hop(&mut self, probe: &str) -> Result<u32, PlanError> {
        if self.plans.hops >= MAX_HOPS {
            return Err(PlanError::TooMany { what: "look-ups", limit: MAX_HOPS, probe: probe.to_owned() });
        }
        self.plans.hops += 1;
        Ok(self.plans.hops - 1)
    }
}

impl Draft<'_> {
    /// Begins a loop over the items of what is in `from`; gives the register of the item.
    fn begin_loop(&mut self, loops: &mut Vec<usize>, from: u8, field: u8, kind: u8, separator: u32) -> u8 {
        loops.push(self.ops.len());
        let max = u32::from(kind) << 16 | MAX_ITEMS;
        self.emit(Op { code: op::EACH, src: from, field, hop: separator, max, ..Op::zeroed() })
    }

    /// Ends the loop that begins at an operation.
    fn end_loop(&mut self, begin: usize) {
        let Op { dst, field, max, .. } = self.ops[begin];
        self.ops[begin].arg = self.ops.len() as u32;
        self.ops.push(Op { code: op::NEXT, dst, field, max, ..Op::zeroed() });
    }

    /// Adds an operation that writes a new register.
    fn emit(&mut self, mut op: Op) -> u8 {
        // A number past the last register is never used: the draft is refused.
        op.dst = u8::try_from(self.registers).unwrap_or(u8::MAX);
        self.registers += 1;
        self.ops.push(op);
        op.dst
    }
}

#[cfg(test)]
mod tests {
    use super::super::notation;
    use super::*;

    fn compiled(notation: &str) -> Result<Plans, PlanError> {
        compile(&[notation::parse(notation).expect(notation)])
    }

    /// A plan as text, one operation a line.
    fn listing(plans: &Plans, plan: Option<&PlanRef>) -> Vec<String> {
        let Some(plan) = plan else { return Vec::new() };
        let used = &plans.plans[plan.number as usize];
        let key = |number: u32| {
            let key = &plans.keys[number as usize];
            String::from_utf8(bytemuck::bytes_of(&key.text)[..key.len as usize].to_vec()).unwrap()
        };
        used.ops[..used.len as usize]
            .iter()
            .map(|o| match o.code {
                0 => "nothing".to_owned(),
                op::ARG if o.hop > 0 => {
                    format!("r{} = arg {} or {}", o.dst, o.arg as i32, key(o.hop - 1))
                }
                op::ARG => format!("r{} = arg {}", o.dst, o.arg),
                op::RESULT => format!("r{} = result", o.dst),
                op::EXCEPTION => format!("r{} = exception", o.dst),
                op::EXCEPTION_TYPE => format!("r{} = exception type", o.dst),
                op::FUNCTION => format!("r{} = function", o.dst),
                op::ATTR => format!("r{} = r{}.{} #{}", o.dst, o.src, key(o.arg), o.hop),
                op::KEY => format!("r{} = r{}['{}'] #{}", o.dst, o.src, key(o.arg), o.hop),
                op::ITEM => format!("r{} = r{}[{}]", o.dst, o.src, o.arg),
                op::LOAD if o.arg == LOAD_FUNC_GLOBALS => {
                    format!("r{} = globals of r{}", o.dst, o.src)
                }
                op::LOAD if o.arg == LOAD_EXCEPTION_ARGS => {
                    format!("r{} = args of r{}", o.dst, o.src)
                }
                op::TYPE => format!("r{} = type of r{}", o.dst, o.src),
                op::VALUE => format!("field {} = r{} ({}, #{})", o.field, o.src, o.max, o.hop),
                op::EACH | op::NEXT => {
                    let kind = match (o.max >> 16) as u8 {
                        value::LIST => "list".to_owned(),
                        value::MAP => "dict".to_owned(),
                        value::JOIN => format!("text with {:?}", char::from(o.hop as u8)),
                        value::RAW_PATH | value::PATH_PARTS => "path".to_owned(),
                        kind => panic!("list of kind {kind}"),
                    };
                    if o.code == op::EACH {
                        format!("field {} = {kind} of r{}: for r{}, next is {}", o.field, o.src, o.dst, o.arg)
                    } else {
                        format!("next r{}", o.dst)
                    }
                }
                op::RETURN if o.arg != 0 => "return if captured".to_owned(),
                op::RETURN => "return".to_owned(),
                op::UUID => format!("field = UUID r{}", o.src),
                op::TYPE_NAME => format!("field {} = name of r{} ({})", o.field, o.src, o.max),
                op::LEN => format!("field {} = len r{}", o.field, o.src),
                code => panic!("operation {code}"),
            })
            .collect()
    }

    #[test]
    fn common_beginnings_of_paths_are_walked_once() {
        let plans =
            compiled("m:f(a=self.node.name, b=self.node.config['x'], c=self.node, t=type(self), n=len(self.node.l))")
                .unwrap();
        assert_eq!(
            listing(&plans, plans.probes[0].enter.as_ref()),
            [
                "r0 = arg 0",
                "r1 = r0.node #4",
                "r2 = r1.name #5",
                "field 0 = r2 (256, #6)",
                "r3 = r1.config #7",
                "r4 = r3['x'] #8",
                "field 1 = r4 (256, #9)",
                "field 2 = r1 (256, #10)",
                "r5 = type of r0",
                "field 3 = name of r5 (256)",
                "r6 = r1.l #11",
                "field 4 = len r6",
            ]
        );
        let names: Vec<_> =
            plans.probes[0].enter.as_ref().unwrap().fields.iter().map(opentelemetry::Key::as_str).collect();
        assert_eq!(names, ["a", "b", "c", "t", "n"]);
    }

    #[test]
    fn every_span_captures_the_exception_that_ends_it() {
        let plans = compiled("m:f").unwrap();
        assert_eq!(plans.probes[0].enter, None);
        assert_eq!(
            listing(&plans, plans.probes[0].exit.as_ref()),
            [
                "r0 = exception type",
                "field 0 = name of r0 (256)",
                "r1 = exception",
                "field 1 = r1 (1020, #4)",
                "r2 = args of r1",
                "r3 = r2[0]",
                "field 2 = r3 (1020, #5)",
            ]
        );
        assert_eq!(plans.probes[0].exit.as_ref().unwrap().fields[2].as_str(), EXCEPTION_MESSAGE);
    }

    #[test]
    fn arguments_have_a_position_a_keyword_or_both() {
        let plans = compiled("m:f(a=arg(1, 'sql'), b=kwargs['sql'], c=arg2)").unwrap();
        let listing = listing(&plans, plans.probes[0].enter.as_ref());
        assert_eq!(listing[0], "r0 = arg 1 or sql");
        assert_eq!(listing[2], "r1 = arg -1 or sql");
        assert_eq!(listing[4], "r2 = arg 2");
    }

    #[test]
    fn globals_are_reached_through_the_function() {
        let mut probe = notation::parse("m:f(a=globals['A'], b=globals['B'])").unwrap();
        probe.kind = Kind::Event;
        let plans = compile(&[probe]).unwrap();
        assert_eq!(
            listing(&plans, plans.probes[0].enter.as_ref())[..4],
            ["r0 = function", "r1 = globals of r0", "r2 = r1['A'] #4", "field 0 = r2 (256, #5)"]
        );
        assert_eq!(plans.probes[0].exit, None, "an event does not look at exceptions");
    }

    #[test]
    fn lists_are_loops_behind_simple_values_and_before_exceptions() {
        let plans =
            compiled("m:f(l=return.x[*].y[*], j=join('/', return.x[*].y[*]), d=dict(return), a=return.x)").unwrap();
        let plan = plans.probes[0].exit.as_ref().unwrap();
        assert_eq!(
            listing(&plans, Some(plan))[..19],
            [
                "r0 = result",
                "r1 = r0.x #4",
                "field 0 = r1 (256, #5)",
                "field 1 = list of r1: for r2, next is 8",
                "r3 = r2.y #6",
                "field 1 = list of r3: for r4, next is 7",
                "field 1 = r4 (256, #7)",
                "next r4",
                "next r2",
                "field 2 = list of r1: for r5, next is 14",
                "r6 = r5.y #8",
                "field 2 = text with '/' of r6: for r7, next is 13",
                "field 2 = r7 (256, #9)",
                "next r7",
                "next r5",
                "field 3 = dict of r0: for r8, next is 18",
                "field 3 = r9 (256, #10)",
                "field 3 = r8 (256, #11)",
                "next r8",
            ]
        );
        assert_eq!(plans.plans[plan.number as usize].returned, 19);
        let names: Vec<_> = plan.fields.iter().map(opentelemetry::Key::as_str).collect();
        assert_eq!(names[..4], ["a", "l", "j", "d"]);
    }

    #[test]
    fn the_library_knows_enums_paths_and_uuids() {
        let plans = compiled("m:f").unwrap();
        let library = PlanRef { number: LIBRARY, fields: Vec::new() };
        let listing = listing(&plans, Some(&library));
        let at = |routine: u32, len: usize| &listing[routine as usize..][..len];
        assert_eq!(
            at(routine::ENUM, 3),
            [&format!("r121 = r120._value_ #{CALLERS_HOP}"), "field 0 = r121 (0, #0)", "return"]
        );
        assert_eq!(
            at(routine::PATH, 13),
            [
                "r121 = r120._str #0",
                "field 0 = r121 (0, #0)",
                "return if captured",
                "r121 = r120._raw_paths #1",
                "field 0 = path of r121: for r122, next is 14",
                "field 0 = r122 (0, #0)",
                "next r122",
                "return if captured",
                "r121 = r120._parts #2",
                "field 0 = path of r121: for r122, next is 19",
                "field 0 = r122 (0, #0)",
                "next r122",
                "return",
            ]
        );
        assert_eq!(at(routine::UUID, 3), ["r121 = r120.int #3", "field = UUID r121", "return"]);
    }

    #[test]
    fn keys_are_shared_and_look_ups_are_not() {
        let probes = ["m:f(a=arg0.x)", "m:g(a=arg0.x)"].map(|text| notation::parse(text).unwrap());
        let plans = compile(&probes).unwrap();
        let text: Vec<_> = plans.keys.iter().map(|key| key.len).collect();
        assert_eq!(text[FIXED_KEYS.len()..], [1], "`x`");
        let mut hops: Vec<_> = plans
            .plans
            .iter()
            .skip(1) // the library's
            .flat_map(|plan| &plan.ops[..plan.len as usize])
            .filter(|o| matches!(o.code, op::ATTR | op::KEY | op::VALUE))
            .map(|o| o.hop)
            .collect();
        hops.sort_unstable();
        assert_eq!(hops, (4..plans.hops).collect::<Vec<_>>());
    }

    #[test]
    fn what_does_not_fit_is_an_error_that_names_the_probe() {
        let deep = "m:f(a=arg0".to_owned() + &".x".repeat(150) + ")";
        let error = compiled(&deep).unwrap_err().to_string();
        assert_eq!(error, "probe `m:f`: its attributes at enter need 151 registers, 120 are possible: capture fewer");

        let wide = "m:f(".to_owned() + &(0..300).map(|i| format!("a{i}=len(arg0)")).collect::<Vec<_>>().join(",") + ")";
        assert!(compiled(&wide).unwrap_err().to_string().contains("need 301 operations, 256 are possible"));

        let long = "m:f(".to_owned() + &(0..50).map(|i| format!("a{i}=arg0")).collect::<Vec<_>>().join(",") + ")";
        assert!(compiled(&long).unwrap_err().to_string().contains("bytes, 10240 are possible"));

        let mut probe = notation::parse("m:f(a=arg0.x)").unwrap();
        probe.attributes[0].path.steps[0] = Step::Key("k".repeat(64));
        assert!(compile(&[probe]).unwrap_err().to_string().contains("must have 1 to 63 ASCII characters"));

        let many: Vec<_> = (0..2100).map(|i| notation::parse(&format!("m:f{i}(a=arg0.x)")).unwrap()).collect();
        assert!(compile(&many).unwrap_err().to_string().contains("need more than"));
    }
}
