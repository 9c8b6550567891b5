//! What must be watched while anything is armed, and what is undone when a program does something that does not go with it.

use floe_ebpf::{FunctionInfo, FunctionKey, NO_PLAN, Urgent, function_flags, process_flags};

use super::{Attacher, GREENLET_EXTENSION, Wait, is_imported};
use crate::{
    attach::{Verdict, guards::GREENLET_API_SWITCHES},
    kernel::Site,
    python::{
        identify::Interpreter,
        memory::{CachedMemory, Memory, ProcessMemory},
        resolve::Resolver,
    },
    units::{Epoch, Pid, UserAddr},
};

/// The functions by which greenlet switches stacks.
struct Switches {
    functions: Vec<UserAddr>,
    /// `switch` and `throw` are among them.
    complete: bool,
}

impl Switches {
    fn find(modules: &Resolver<'_>, memory: &dyn Memory) -> Self {
        let methods = ["switch", "throw"].map(|method| {
            let found = modules.find_method_def(GREENLET_EXTENSION, &format!("greenlet.{method}"));
            found.inspect_err(|error| tracing::debug!("greenlet.{method}: {error}")).ok().map(|found| found.function)
        });
        let complete = methods.iter().all(Option::is_some);
        let mut functions: Vec<_> = methods.into_iter().flatten().collect();
        if let Ok(table) = modules.capsule_pointer(GREENLET_EXTENSION, "_C_API") {
            let entries = GREENLET_API_SWITCHES.map(|index| memory.read_ptr(table.offset(index * 8)));
            functions.extend(entries.into_iter().flatten().filter(|address| !address.is_null()));
        }
        Self { functions, complete }
    }
}

/// 3.11: the functions that change what the C stack has to hold.
fn stack_functions(modules: &Resolver<'_>) -> Result<Vec<UserAddr>, String> {
    [("sys", "setrecursionlimit"), ("_thread", "stack_size")]
        .into_iter()
        .map(|(module, name)| {
            let found = modules.find_method_def(module, name);
            found.map(|found| found.function).map_err(|error| format!("{module}.{name} cannot be watched: {error}"))
        })
        .collect()
}

impl Attacher {
    /// Attaches, as far as that can be done beforehand, what else would be attached while the process waits.
    pub(super) fn attach_guards(&mut self, pid: Pid, interpreter: &Interpreter) {
        let memory = ProcessMemory::new(pid);
        let cached = CachedMemory::new(&memory);
        let Ok(modules) = interpreter.modules(&cached, interpreter.main) else { return };
        let modules = Resolver::new(interpreter.heap(&cached), modules);
        let mut functions = Vec::new();
        if interpreter.layout.inlines_past_vectorcall && !self.options.keep_inlining {
            let found = stack_functions(&modules).unwrap_or_default();
            functions.extend(found.into_iter().map(|function| (Site::StackConfig, function)));
        }
        if is_imported(&modules, GREENLET_EXTENSION) {
            let found = Switches::find(&modules, &memory).functions;
            functions.extend(found.into_iter().map(|function| (Site::StackSwitch, function)));
        }
        for (site, function) in functions {
            // What fails is tried again, and said, when the process waits.
            if let Err(error) = self.files.guards.attach(&mut self.kernel, pid, site, function) {
                tracing::debug!("process {pid}: {error}");
            }
        }
    }

    /// Watches the functions by which greenlet switches stacks. Where that fails, the process is left alone; whether it
    /// is not.
    pub(super) fn guard_greenlet(&mut self, pid: Pid, epoch: Epoch, modules: &Resolver<'_>, wait: Wait) -> bool {
        let Switches { functions, complete } = Switches::find(modules, &ProcessMemory::new(pid));
        let guards = &self.files.guards;
        if complete && functions.iter().all(|&function| guards.is_attached(pid, Site::StackSwitch, function)) {
            return true;
        }
        // Attaching can take longer than the thread waits, and a switch that nobody watches must find nothing armed.
        let armed: Vec<_> =
            self.spaces.get_mut(epoch).map(|traced| traced.armed.values().cloned().collect()).unwrap_or_default();
        if let Some(traced) = self.spaces.get_mut(epoch) {
            traced.disarm_all();
        }
        let attached = functions
            .iter()
            .map(|&function| self.files.guards.attach(&mut self.kernel, pid, Site::StackSwitch, function))
            .collect::<Result<Vec<_>, _>>();
        if !complete || attached.is_err() {
            let why = attached.err().map_or_else(|| "its functions were not found".into(), |e| e.to_string());
            self.switches(pid, epoch, &format!("it has greenlet, whose stack switches cannot be watched: {why}"));
            return false;
        }
        if !wait.lasts() {
            self.meet_again(pid, epoch);
            return false;
        }
        if let Some(traced) = self.spaces.get_mut(epoch) {
            for function in &armed {
                if let Err(error) = traced.arm(function) {
                    tracing::debug!("process {pid}: {error}");
                }
            }
        }
        true
    }

    /// The process is about to switch C stacks: nothing may be armed then.
    pub(super) fn switches(&mut self, pid: Pid, epoch: Epoch, why: &str) {
        let Some(mut info) = self.kernel.process(pid).filter(|info| info.epoch == epoch.0) else { return };
        let mut python = None;
        if let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) {
            python = Some(traced.interpreter.version());
            let functions = traced.disarm_all();
            traced.clear_eval_frame();
            for function in functions {
                self.forget(epoch, function);
            }
        }
        info.flags = (info.flags | process_flags::SWITCHES_STACKS) & !process_flags::GUARD_STACK;
        if let Err(error) = self.kernel.set_process(pid, info) {
            tracing::error!("{error}");
        }
        eprintln!("floe-agent: process {pid}: tracing stops here: {why}");
        self.report.processes.push(Verdict { pid: pid.0, verdict: "stopped", python, reason: Some(why.into()) });
    }

    /// Makes the programs ignore a function in this address space, also if it was armed in an ancestor's.
    pub(super) fn forget(&mut self, epoch: Epoch, function: UserAddr) {
        let key = FunctionKey { epoch: epoch.0, reserved: 0, function: function.0 };
        let info = FunctionInfo {
            code: 0,
            probe: 0,
            flags: function_flags::DISARMED,
            enter_plan: NO_PLAN,
            exit_plan: NO_PLAN,
        };
        if let Err(error) = self.kernel.set_function(key, info) {
            tracing::warn!("{error}");
        }
    }

    /// A function is nested too deep.
    pub(super) fn recursion(&mut self, pid: Pid, epoch: Epoch, function: UserAddr, wait: Wait) {
        let Some(info) = self.kernel.process(pid) else { return };
        let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) else { return };
        // The programs ignore it from now on in any case.
        let disarmed = wait.lasts() && traced.disarm(function);
        self.forget(epoch, function);
        if disarmed {
            self.report.functions_disarmed += 1;
            eprintln!(
                "floe-agent: process {pid}: a watched function calls itself more than {} deep: it is no longer watched there",
                floe_ebpf::MAX_DEPTH
            );
        }
    }

    /// 3.11: turns inlining off where that is safe.
    pub(super) fn set_eval_frame(&mut self, pid: Pid, epoch: Epoch) {
        if self.options.keep_inlining {
            return;
        }
        let Some(traced) = self.spaces.get_mut(epoch) else { return };
        if !traced.interpreter.layout.inlines_past_vectorcall {
            return;
        }
        if let Some(why) = traced.stack_too_small(None) {
            eprintln!("floe-agent: process {pid}: calls from Python to Python are not seen: {why}");
            return;
        }
        let memory = ProcessMemory::new(pid);
        let cached = CachedMemory::new(&memory);
        let interpreter = traced.interpreter.clone();
        let Ok(modules) = interpreter.modules(&cached, interpreter.main) else { return };
        let modules = Resolver::new(interpreter.heap(&cached), modules);
        let guarded = stack_functions(&modules).and_then(|functions| {
            functions.into_iter().try_for_each(|function| {
                let attached = self.files.guards.attach(&mut self.kernel, pid, Site::StackConfig, function);
                attached.map_err(|error| error.to_string())
            })
        });
        if let Err(error) = guarded {
            eprintln!("floe-agent: process {pid}: calls from Python to Python are not seen: {error}");
            return;
        }
        let Some(mut info) = self.kernel.process(pid) else { return };
        info.flags |= process_flags::GUARD_STACK;
        if let Err(error) = self.kernel.set_process(pid, info) {
            tracing::error!("{error}");
            return;
        }
        if let Err(error) = traced.set_eval_frame() {
            eprintln!("floe-agent: process {pid}: calls from Python to Python are not seen: {error}");
        }
    }

    /// The process is about to change its recursion limit or the size of new stacks.
    pub(super) fn stack_config(&mut self, pid: Pid, epoch: Epoch, record: &Urgent) {
        let Some(info) = self.kernel.process(pid) else { return };
        let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) else { return };
        let cached = CachedMemory::new(&traced.memory);
        let heap = traced.interpreter.heap(&cached);
        let argument = UserAddr(record.arg0);
        // setrecursionlimit gets its argument as it is (METH_O), stack_size as a tuple.
        let value = heap
            .int(argument)
            .or_else(|_| heap.tuple(argument).and_then(|items| items.first().map_or(Ok(0), |&item| heap.int(item))));
        let value = value.unwrap_or(i64::MAX);
        if let Some(why) = traced.stack_too_small(Some(value)) {
            if traced.eval_frame {
                eprintln!("floe-agent: process {pid}: calls from Python to Python are not seen from here on: {why}");
            }
            traced.clear_eval_frame();
        }
    }
}
