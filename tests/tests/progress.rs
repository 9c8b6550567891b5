//! The live line, on a real terminal.

use floe_tests::{Agent, can_trace, one_of};

const PROBE: &str = "idle_target:work(t.n=arg0)";
/// Ten calls, a pause in which the line is drawn, ten calls.
const PROGRAM: &str = "idle.py";

/// What a terminal shows at the end, and all that the last line has shown.
struct Screen {
    shown: String,
    lines: Vec<String>,
}

impl Screen {
    /// Understands what is needed here: carriage return, line feed, "erase to the end of the line", and colours.
    fn of(bytes: &str) -> Self {
        let mut lines: Vec<Vec<char>> = vec![Vec::new()];
        let (mut column, mut drawn) = (0, Vec::new());
        let mut rest = bytes.chars();
        while let Some(character) = rest.next() {
            let line = lines.last_mut().expect("there is a line");
            match character {
                '\r' => {
                    drawn.push(line.iter().collect());
                    column = 0;
                }
                '\n' => lines.push(Vec::new()),
                '\x1b' => match rest.by_ref().skip(1).find(char::is_ascii_alphabetic) {
                    Some('K') => line.truncate(column),
                    command => assert_eq!(command, Some('m'), "{bytes:?}"),
                },
                character => {
                    line.resize(line.len().max(column + 1), ' ');
                    line[column] = character;
                    column += 1;
                }
            }
        }
        let shown: Vec<String> = lines.into_iter().map(String::from_iter).collect();
        Self { shown: shown.join("\n"), lines: drawn }
    }

    /// Spans, open spans, errors, lost events, as the live line has shown them.
    fn counts(&self) -> Vec<[usize; 4]> {
        let counts = self.lines.iter().filter_map(|line| {
            let words: Vec<&str> = line.strip_prefix("floe-agent: ")?.split(", ").collect();
            let number = |at: usize, what: &str| words.get(at)?.strip_suffix(what)?.parse().ok();
            Some([number(0, " spans")?, number(1, " open")?, number(2, " errors")?, number(3, " events lost")?])
        });
        counts.collect()
    }
}

#[test]
fn exec_shows_how_things_stand_and_takes_the_line_away_at_the_end() {
    let Some(_alone) = can_trace() else { return };
    let run = one_of(&[12, 11]).program(PROGRAM);
    let mut tracing = Agent::new().probe(PROBE).on_a_terminal().start(&run);
    tracing.agent.wait_for_output("ready");
    tracing.agent.wait_for_error("floe-agent: 10 spans, 0 open, 0 errors, 0 events lost");
    tracing.agent.close_input();
    let outcome = tracing.wait();
    assert_eq!(outcome.finished.expect(0), "ready\n", "the command's output is its own");
    assert_eq!(outcome.named("work").count(), 20, "{outcome}");
    let screen = Screen::of(&outcome.finished.err());
    assert_eq!(screen.shown, "", "the line is gone");
    assert!(screen.counts().contains(&[10, 0, 0, 0]), "{:?}", screen.lines);
}

#[test]
fn attach_shows_open_spans_and_errors() {
    let Some(_alone) = can_trace() else { return };
    let script = "import sys; sys.path.insert(0, sys.argv[1])\n\
        import armed, idle_target\n\
        def outer():\n    sys.stdin.readline(); failing()\n\
        def failing():\n    raise ValueError('no')\n\
        idle_target.outer, idle_target.failing = outer, failing\n\
        print('ready', flush=True)\n\
        armed.wait_until_armed(failing)\n\
        print('armed', flush=True)\n\
        try: outer()\n\
        except ValueError: pass\n\
        sys.stdin.readline()";
    let programs = floe_tests::program("idle_target.py");
    let run = one_of(&[12, 11]).script(script).arg(programs.parent().expect("it is in a folder"));
    let mut program = run.start();
    program.wait_for_output("ready");
    let agent = Agent::new().probes(&["idle_target:outer", "idle_target:failing"]).on_a_terminal();
    let mut tracing = agent.attach(program.pid());
    program.wait_for_output("armed");
    tracing.agent.wait_for_error("floe-agent: 0 spans, 1 open, 0 errors, 0 events lost");
    program.write("\n");
    tracing.agent.wait_for_error("floe-agent: 2 spans, 0 open, 2 errors, 0 events lost");
    program.close_input();
    program.wait().expect(0);
    let outcome = tracing.wait();
    outcome.finished.expect(0);
    assert_eq!(outcome.spans.len(), 2, "{outcome}");
    let screen = Screen::of(&outcome.finished.err());
    assert!(!screen.shown.contains(" open, "), "{:?}", screen.shown);
}

#[test]
fn without_a_terminal_or_when_it_is_not_wanted_there_is_no_line() {
    let Some(_alone) = can_trace() else { return };
    let run = one_of(&[12, 11]).program(PROGRAM);
    let unwanted = Agent::new().option("--set").option("progress=false").on_a_terminal();
    for agent in [Agent::new(), unwanted] {
        let mut tracing = agent.probe(PROBE).start(&run);
        tracing.agent.wait_for_output("ready");
        // The line would be drawn four times in this.
        std::thread::sleep(std::time::Duration::from_secs(1));
        tracing.agent.close_input();
        let outcome = tracing.wait();
        outcome.finished.expect(0);
        assert_eq!(outcome.named("work").count(), 20, "{outcome}");
        assert_eq!(outcome.finished.err(), "", "{outcome}");
    }
}

#[test]
fn the_agents_own_log_has_the_level_that_the_environment_asks_for() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11, 13, 10]);
    let debug = |variables: &[(&str, &str)]| {
        let run = interpreter.script("import json");
        let run = variables.iter().fold(run, |run, (name, value)| run.variable(name, value));
        let outcome = Agent::new().probe("json:loads").exec(&run);
        outcome.finished.expect(0);
        outcome.finished.err().contains("DEBUG")
    };
    assert!(!debug(&[]));
    assert!(debug(&[("OTEL_LOG_LEVEL", "debug")]));
    assert!(!debug(&[("OTEL_LOG_LEVEL", "debug"), ("FLOE_LOG_LEVEL", "error")]));
}
