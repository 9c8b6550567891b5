"""Stand-ins for the functions of the packs: each value of the catalogue where it should be, then missing on each step of its
path, and what Python itself reads there.

    stand_in.py prepare FOLDER PACK...   writes modules, a pack, cases, and the names of all attributes into FOLDER; needs PyYAML
    stand_in.py run FOLDER               calls them, and writes expected.json: {case: {attribute: value}}

The pack has the attributes of the packs as they are, each function's on a span of its own. What begins with `_` is there
a second time under a name that a span can have.
"""
import json
import os
import re
import sys
import uuid

STEP = re.compile(r"\.(?P<attribute>\w+)|\['(?P<key>[^']*)'\]|\[(?P<item>\d+)\]|(?P<each>\[\*\])")
ROOT = re.compile(r"arg\((?P<number>\d+), *'(?P<name>\w+)'\)|arg(?P<position>\d+)|(?P<self>self)|kwargs\['(?P<keyword>\w+)'\]"
                  r"|(?P<return>return)|(?P<exception>exception)|globals\['(?P<global>\w+)'\]")
ABSENT = object()
# Types live as long as the program, as those of a framework do.
types = []


def new_type(name, bases=(), namespace=None):
    types.append(type(name, bases, namespace or {}))
    return types[-1]


def parse(text):
    """(how its end is read, its root, its steps)"""
    read = "value"
    inner = re.fullmatch(r"(type|len|dict|str|uuid)\((.*)\)", text)
    joined = re.fullmatch(r"join\('([^']*)', *(.*)\)", text)
    if inner:
        read, text = inner.groups()
    elif joined:
        read, text = ("join", joined.group(1)), joined.group(2)
    root = ROOT.match(text)
    assert root, text
    at = root.end()
    steps = []
    while at < len(text):
        step = STEP.match(text, at)
        assert step, text
        steps.append([step.lastgroup, step.group(step.lastgroup)])
        at = step.end()
    kind = "argument" if root.lastgroup in ("number", "name", "position", "self") else root.lastgroup
    found = root.groupdict()
    if kind == "argument":
        root = [kind, int(found["number"] or found["position"] or 0), found["name"]]
    else:
        root = [kind, found["keyword"] or found["global"], None]
    return {"read": "value" if read == "str" else read, "root": root, "steps": steps}


def sources_of(value):
    """An attribute's sources in the long form."""
    return [{"path": one} if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]


def prepare(folder, packs):
    import yaml
    functions, names = [], set()
    for file in packs:
        with open(file) as text:
            pack = yaml.safe_load(text)
        for probe in pack["probes"]:
            names.update(name for rule in probe.get("rules", []) for name in rule.get("set", {}))
            # What a span has from those around it may be named; here there are none.
            begun = [probe.get("span", {})] + [rule["begin"] for rule in probe.get("rules", []) if "begin" in rule]
            inherit = [name for span in begun for name in span.get("inherit", [])]
            functions.append((pack["pack"], probe["target"], probe.get("attributes", {}), inherit))
            for end in probe.get("end", []):
                if end["target"] != "return":
                    functions.append((pack["pack"], end["target"], end.get("attributes", {}), []))
    modules, probes, cases = {}, [], []
    for number, (pack, target, attributes, inherit) in enumerate(functions):
        module, name = target.split(":")
        if "<locals>" in name:
            name = "local%d" % number
        if not attributes:
            continue
        # Where Python itself has a module of this name there must be another one.
        module = "stand_in_" + module
        modules.setdefault(module, []).append(name)
        wanted = {"t.case": "globals['CASE']"}
        for attribute, value in attributes.items():
            names.add(attribute)
            wanted[attribute] = value
            if attribute.startswith("_") and not any("dict(" in source.get("path", "") for source in sources_of(value)):
                wanted["t." + attribute] = {"template": "{" + attribute + "}"}
        span = {"name": "stand-in", "inherit": inherit}
        probes.append({"name": "%s %d" % (pack, number), "target": module + ":" + name, "span": span, "attributes": wanted})
        cases.append({"module": module, "name": name, "pack": pack, "attributes": [
            [attribute, [dict(one, path=parse(one["path"])) if "path" in one else one for one in sources_of(value)]]
            for attribute, value in wanted.items() if attribute != "t.case"]})
    for module, functions_of in modules.items():
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            package = os.path.join(folder, *parts[:depth])
            os.makedirs(package, exist_ok=True)
            open(os.path.join(package, "__init__.py"), "a").close()
        classes = {}
        lines = ["CASE = RESULT = RAISED = None", "", "def outcome():"]
        lines += ["    if RAISED is not None:", "        raise RAISED", "    return RESULT"]
        for name in functions_of:
            if "." in name:
                classes.setdefault(name.split(".")[0], []).append(name.split(".")[1])
            else:
                lines += ["", "def %s(*args, **kwargs):" % name, "    return outcome()"]
        for class_, methods in classes.items():
            lines += ["", "class %s:" % class_]
            for method in methods:
                lines += ["    def %s(self, *args, **kwargs):" % method, "        return outcome()"]
        with open(os.path.join(package, "__init__.py"), "a") as file:
            file.write("\n".join(lines) + "\n")
    with open(os.path.join(folder, "pack.yaml"), "w") as file:
        json.dump({"pack": "stand-in", "probes": probes}, file)
    with open(os.path.join(folder, "cases.json"), "w") as file:
        json.dump(cases, file)
    with open(os.path.join(folder, "names.json"), "w") as file:
        json.dump(sorted(name for name in names if name != "*" and not name.startswith("_")), file)


class Node:
    """A place that paths lead to or through."""

    def __init__(self):
        self.steps = {}
        self.reads = set()

    def add(self, steps, read):
        node = self
        for step in steps:
            node = node.steps.setdefault(tuple(step), Node())
        node.reads.add(read if isinstance(read, str) else "value")

    def places(self, way=()):
        """Every place below, by the way to it."""
        for step, node in self.steps.items():
            yield way + (step,)
            for place in node.places(way + (step,)):
                yield place


class Maker:
    """Makes objects for places; what is at `hole` is replaced by `instead`, or left out."""

    def __init__(self, hole, instead, items):
        self.hole, self.instead, self.items = hole, instead, items
        self.made = 0

    def number(self):
        self.made += 1
        return self.made

    def make(self, node, way, own=None):
        """The object at a place; `own`: an object that is to have the attributes."""
        if own is None and way == self.hole:
            return self.instead
        kinds = {step[0] for step in node.steps}
        if not node.steps and own is not None:
            return own
        if not node.steps:
            if "dict" in node.reads:
                return {"one": "e%d" % self.number(), "two": self.number(), "three": None}
            if "len" in node.reads:
                return (self.number(),) * (self.number() % 5 + 1)
            if "uuid" in node.reads:
                return 0x1234 << 64 | self.number()
            if "type" in node.reads:
                return new_type("Kind%d" % self.number(), (Exception,))()
            return "v%d" % self.number()
        if "each" in kinds:
            each = ("each", "[*]")
            items = [self.make(node.steps[each], way + (each,)) for _ in range(self.items)]
            if self.hole and self.hole[:-1] == way and self.hole[-1][0] == "item":
                items[int(self.hole[-1][1])] = self.instead
            return [item for item in items if item is not ABSENT]
        if kinds == {"key"}:
            made = {step[1]: self.make(below, way + (step,)) for step, below in node.steps.items()}
            return {key: item for key, item in made.items() if item is not ABSENT}
        if kinds == {"item"}:
            # What is behind a missing item is missing too.
            items = []
            for at in range(max(int(step[1]) for step in node.steps) + 1):
                below = node.steps.get(("item", str(at)))
                item = self.make(below, way + (("item", str(at)),)) if below else None
                if item is ABSENT:
                    break
                items.append(item)
            return tuple(items)
        assert kinds == {"attribute"}, (way, kinds)
        names = [step[1] for step in node.steps]
        made = {step[1]: self.make(below, way + (step,)) for step, below in node.steps.items()}
        made = {name: item for name, item in made.items() if item is not ABSENT}
        if own is None and "args" in made and way[0][0] == "exception":
            own = new_type("Kind%d" % self.number(), (Exception,))()
        if own is None:
            own = self.layout(names, made)
        if isinstance(own, tuple):
            return own
        for name, item in made.items():
            if name != "args" or isinstance(item, (tuple, list)):  # an exception cannot have others
                setattr(own, name, item)
        return own

    def layout(self, names, made):
        """An object of one of the layouts that Python has for attributes."""
        number = self.number()
        name = "Kind%d" % number
        if number % 4 == 0:
            return new_type(name)()
        if number % 4 == 1:
            return new_type(name, (), {"__slots__": tuple(names)})()
        if number % 4 == 2 and all(not field.startswith("_") for field in made):
            import collections
            types.append(collections.namedtuple(name, list(made)))
            return types[-1](**made)
        own = new_type(name)()
        vars(own)  # has its dict made
        return own


def hop(value, step):
    kind, name = step
    if kind == "attribute":
        if name == "args" and isinstance(value, BaseException):
            return value.args
        if isinstance(value, tuple):
            fields = getattr(type(value), "_fields", ())
            return value[fields.index(name)] if name in fields else ABSENT
        if name in getattr(value, "__dict__", {}):
            return value.__dict__[name]
        if type(vars(type(value)).get(name)).__name__ == "member_descriptor":
            return getattr(value, name, ABSENT)
        return ABSENT
    if kind == "key":
        return value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
    if isinstance(value, (tuple, list)) and int(name) < len(value):
        return value[int(name)]
    return ABSENT


def simple(value):
    return value if isinstance(value, (str, int, float, bool)) else ABSENT


def walk(value, steps, read):
    """What is at the end of a path, as an attribute has it."""
    for at, step in enumerate(steps):
        if step[0] == "each":
            if isinstance(value, dict):
                value = list(value.values())
            if not isinstance(value, (tuple, list)):
                return ABSENT
            last = all(step[0] != "each" for step in steps[at + 1:])
            items = [walk(item, steps[at + 1:], "value" if last else read) for item in value]
            if isinstance(read, list) and last:
                return read[1].join(map(text, items)) if ABSENT not in items else ABSENT
            # Attributes know no lists of lists.
            lists = [item if isinstance(item, list) else [item] for item in items if item is not ABSENT]
            return [item for items in lists for item in items]
        value = hop(value, step)
        if value is ABSENT:
            return ABSENT
    if read == "type":
        return type(value).__name__
    if read == "uuid":
        return str(uuid.UUID(int=value)) if type(value) is int and value >= 0 else ABSENT
    if read == "len":
        return len(value) if isinstance(value, (tuple, list, dict, str)) else ABSENT
    if read == "dict":
        return {key: simple(item) for key, item in value.items()} if isinstance(value, dict) else ABSENT
    return simple(value)


def text(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    return "[]" if value == [] else str(value)


def expected(attributes, roots, by_keyword):
    """The attributes of a span, as the packs' notation says. `by_keyword`: the arguments that have a name have no position."""
    found = {}

    def find(path):
        kind, name, keyword = path["root"]
        root = roots.get((kind, name), ABSENT)
        if root is ABSENT or by_keyword and kind == "argument" and (kind, name) in by_keyword and not keyword:
            return ABSENT
        return walk(root, path["steps"], path["read"])

    for moment in (False, True):
        for name, sources in attributes:
            values = next((source["values"] for source in sources if "values" in source), {})
            for source in sources:
                if "path" not in source:
                    continue
                late = source.get("at") == "exit" or source["path"]["root"][0] in ("return", "exception")
                value = find(source["path"]) if late == moment else ABSENT
                if value is ABSENT:
                    continue
                if isinstance(value, dict):
                    for key, item in value.items():
                        if item is not ABSENT:
                            found[key if name == "*" else name + "." + key] = item
                    continue
                value = values.get(text(value), values.get("*", value))
                if value is not None:
                    found[name] = value
        computed = {}
        for name, sources in attributes:
            if name in found:
                continue
            for source in sources:
                value = formula(source, {**found, **computed})
                if value is not ABSENT:
                    computed[name] = value
        if moment:
            found.update(computed)
    return {name: value for name, value in found.items() if not name.startswith("_")}


def formula(source, known):
    if "const" in source:
        return source["const"]
    if "only" in source:
        items = known.get(source["only"])
        items = items if isinstance(items, list) else [items] if items is not None else []
        return items[0] if len(items) == 1 else ABSENT
    if "sql_operation" in source:
        word = re.match(r"[A-Za-z_]+", text(known.get(source["sql_operation"], "")))
        return word.group().upper() if word else ABSENT
    if "template" not in source:
        return ABSENT
    whole = re.fullmatch(r"\{([^{}]*)\}", source["template"])
    names = [source["template"]]
    while re.search(r"\{[^{}]*\}", names[0]):
        inner = re.search(r"\{([^{}]*)\}", names[0])
        if inner.group(1) not in known:
            return ABSENT
        value = known[inner.group(1)]
        if whole and inner.group(0) == names[0]:
            if "add" not in source:
                return value
            return value + source["add"] if type(value) is int else ABSENT
        names[0] = names[0].replace(inner.group(0), text(value), 1)
    return names[0]


def run(folder):
    import importlib
    sys.path.insert(0, folder)
    with open(os.path.join(folder, "cases.json")) as file:
        functions = json.load(file)
    all_expected = {}
    for function in functions:
        module = importlib.import_module(function["module"])
        roots, named = {}, {}
        for _, sources in function["attributes"]:
            for path in (source["path"] for source in sources if "path" in source):
                kind, name, keyword = path["root"]
                roots.setdefault((kind, name), Node()).add(path["steps"], path["read"])
                if keyword:
                    named[kind, name] = keyword
        methods_self = ("argument", 0) if "." in function["name"] else None
        places = [(None, ABSENT, "all"), (None, ABSENT, "all, with lists of one")]
        for root, node in roots.items():
            for way in [(root,)] * (root != methods_self) + list(node.places((root,))):
                places += [(way, ABSENT, "missing"), (way, None, "None"), (way, object(), "an object")]
                places += [(way, -3, "an int"), (way, [], "a list")]
        # A call that returns, and one that raises, where that is looked at.
        for raises in sorted({False} | {kind == "exception" for kind, _ in roots}):
            for number, (hole, instead, what) in enumerate(places):
                for keywords in ({}, named) if hole is None else ({},):
                    case = "%s:%s %d" % (function["module"], function["name"], len(all_expected))
                    maker = Maker(hole, instead, 1 if what.endswith("one") else 2)
                    do, wanted = prepare_call(module, function, roots, maker, keywords, raises)
                    said = what + " by keyword" * bool(keywords) + "".join(" %s" % (step[1],) for step in hole or [])
                    all_expected[case] = {
                        "function": function["name"], "what": said, "attributes": dict(wanted, **{"t.case": case}),
                    }
                    module.CASE = case
                    do()
    with open(os.path.join(folder, "expected.json"), "w") as file:
        json.dump(all_expected, file)


def prepare_call(module, function, roots, maker, named, raises):
    """A call, and the attributes that a span of it must have."""
    owner, _, method = function["name"].rpartition(".")
    keywords, positions, there = {}, {}, {}
    module.RESULT = module.RAISED = None
    for (kind, name), node in roots.items():
        own = None
        if kind == "argument" and name == 0 and owner:
            own = getattr(module, owner)()
        elif kind == "exception":
            own = new_type("Raised", (Exception,))()
        value = maker.make(node, ((kind, name),), own)
        if value is ABSENT and kind == "argument" and any(other[0] == kind and other[1] > name for other in roots):
            value = None
        if value is ABSENT and kind == "return":
            value = None
        if kind == "global":
            vars(module).pop(name, None)
        if value is ABSENT:
            continue
        if kind == "exception":
            if not raises or not isinstance(value, BaseException):
                continue
            module.RAISED = value
        elif kind == "return":
            if raises:
                continue
            module.RESULT = value
        elif kind == "argument" and (kind, name) in named:
            keywords[named[kind, name]] = value
        elif kind == "argument":
            positions[name] = value
        elif kind == "keyword":
            keywords[name] = value
        else:
            setattr(module, name, value)
        there[kind, name] = value
    if owner and 0 not in positions:
        positions[0] = getattr(module, owner)()
    arguments = [positions.get(at) for at in range(max(positions, default=-1) + 1)]
    callee = getattr(arguments.pop(0), method) if owner else getattr(module, method)

    def do():
        try:
            callee(*arguments, **keywords)
        except Exception:
            pass
    return do, expected(function["attributes"], there, named)


if sys.argv[1] == "prepare":
    prepare(sys.argv[2], sys.argv[3:])
else:
    run(sys.argv[2])
