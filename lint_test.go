package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The architecture as a failing test: which package may import which, and the
// habits that the compiler does not enforce. Each row and each rule carries its
// reason. Where a line has to break a rule, it says why in a comment on the
// same line or right above:
//
//	// panic: REASON      ends the process outside main.go
//	// goroutine: NAME    starts a goroutine; NAME is in the table of ARCHITECTURE.md
//	// order: REASON      ranges over a map in package kv
//	// long: REASON       the file has more than 800 lines (in its first comment)

const (
	lintModule   = "pontoon"
	lintStd      = "std" // stands for the whole standard library in lintEdges
	lintMaxLines = 800
)

// lintEdges are the imports that are allowed: from a directory to an import
// path and what lies below it. A package without a row here fails the test.
var lintEdges = []struct {
	from, to string
	tests    bool // for test files only
	why      string
}{
	{".", lintStd, false, "the node: it owns raft, the disk and the network"},
	{".", "pontoon/kv", false, "the state that commits are applied to"},
	{".", "pontoon/api", false, "what the HTTP layer writes"},
	{".", "pontoon/internal", false, "rules that can be said without raft"},
	{".", "go.etcd.io/raft/v3", false, "consensus"},
	{".", "go.etcd.io/etcd/server/v3/etcdserver/api", false, "rafthttp, and the stats and snap packages it asks for"},
	{".", "go.etcd.io/etcd/client/pkg/v3", false, "types and files that rafthttp and wal have in their signatures"},
	{".", "google.golang.org/protobuf/proto", false, "raft's messages are protobuf"},
	{".", "google.golang.org/protobuf/encoding/protowire", false, "looks at a peer's message before it is decoded"},
	{".", "go.uber.org/zap", false, "the logger that raft, rafthttp and wal log to"},
	{".", "golang.org/x/sys/unix", true, "network namespaces, mounts and a frozen file system"},
	{".", "github.com/prometheus/client_golang", false, "/metrics, where rafthttp and wal register theirs"},
	{".", "github.com/coreos/go-semver", false, "checks a peer's version header as rafthttp will, which panics on a bad one"},
	{".", "pontoon/client", true, "tests talk to a node as its users do"},
	{".", "golang.org/x/sys/unix", true, "tests give processes networks and mounts of their own"},
	{".", "github.com/anishathalye/porcupine", true, "checks histories for linearizability"},
	{".", "pgregory.net/rapid", true, "random histories that shrink"},
	{".", "github.com/santhosh-tekuri/jsonschema/v6", true, "holds real answers against api/openapi.json"},

	{"kv", lintStd, false, "the state machine: the same commands give the same state on every node"},
	{"kv", "github.com/tidwall/btree", false, "an ordered map that copies in O(1), for snapshots while writes go on"},
	{"kv", "pgregory.net/rapid", true, "random commands against a naive map"},

	{"api", lintStd, false, "the JSON shapes and error codes: both ends share them, so they drag nothing along"},

	{"client", lintStd, false, "what a Go program imports: it must not inherit the server's dependencies"},
	{"client", "pontoon/api", false, "the shapes and codes it decodes"},

	{"internal/bench", lintStd, false, "a client that measures: it shares nothing with the node but the API"},
	{"internal/bench", "pontoon/api", false, "the status and the codes it decodes"},

	{"internal/sim", lintStd, false, "virtual time and faults: a rule without raft"},

	{"internal/wait", lintStd, false, "who waits for which result: a rule without raft"},

	{"internal/wal", lintStd, false, "the log on disk: frames and files, no raft"},
	{"internal/wal", "golang.org/x/sys/unix", false, "fdatasync, fallocate and SEEK_HOLE"},
	{"internal/wal", "pgregory.net/rapid", true, "random writes, ends and releases against a list"},

	{"internal/watch", lintStd, false, "who gets which events: a rule without raft"},
	{"internal/watch", "pontoon/kv", false, "events and spans of keys"},
	{"internal/watch", "pgregory.net/rapid", true, "random filters and events against a naive list"},
}

// lintRefused overrules lintEdges, so that an edge cannot be drawn in passing.
// From "*" is every package but the root.
var lintRefused = []struct{ from, to, why string }{
	{"*", "go.etcd.io", "only the root knows raft; a leaf stays testable without it"},
	{"kv", "os", "the state machine does no I/O of its own"},
	{"kv", "net", "the state machine does no I/O of its own"},
	{"kv", "math/rand", "replicas would differ"},
	{"kv", "crypto/rand", "replicas would differ"},
	{"kv", "hash/maphash", "its seed differs between processes, so replicas would differ"},
}

type lintReport func(pos token.Pos, format string, args ...any)

type lintRule struct {
	name, why string
	check     func(p *lintPackage, report lintReport)
}

// lintRules returns the rules; architecture is the text of ARCHITECTURE.md, and
// without one the names of goroutines are not looked up.
func lintRules(architecture string) []lintRule {
	return []lintRule{
		{"imports", "the root imports leaves and leaves import what lintEdges draws, so that each can be read and tested alone", lintImports},
		{"package doc", "a reader learns what a package is for before its code", lintPackageDoc},
		{"exits", "only main.go ends the process: elsewhere an exit skips the shutdown, and a caller cannot test for it", lintExits},
		{"sleep", "a sleep in a test is either too short on a busy machine or too long on all others: wait for the thing, or use synctest", lintSleep},
		{"skip", "a test that is skipped without a reason is a test that nobody misses", lintSkip},
		{"deterministic kv", "the same commands have to give the same state and results on every replica", lintDeterminism},
		{"long file", "a file beyond 800 lines is usually two", lintLength},
		{"goroutines", "the table of goroutines in ARCHITECTURE.md is complete: who owns what can be looked up", func(p *lintPackage, report lintReport) {
			lintGoroutines(p, architecture, report)
		}},
	}
}

func TestLint(t *testing.T) {
	fset := token.NewFileSet()
	packages, err := lintLoad(fset)
	if err != nil {
		t.Fatal(err)
	}
	architecture, err := os.ReadFile("ARCHITECTURE.md")
	if errors.Is(err, fs.ErrNotExist) {
		t.Log("there is no ARCHITECTURE.md yet: the names of goroutines are not compared with its table")
	} else if err != nil {
		t.Fatal(err)
	}
	for _, rule := range lintRules(string(architecture)) {
		t.Run(rule.name, func(t *testing.T) {
			for _, p := range packages {
				rule.check(p, func(pos token.Pos, format string, args ...any) {
					t.Errorf("%v: %s\n\t%s", fset.Position(pos), fmt.Sprintf(format, args...), rule.why)
				})
			}
		})
	}
}

// lintPackage is the files of one directory, tests included; dir is relative to
// the root, with slashes.
type lintPackage struct {
	dir   string
	fset  *token.FileSet
	files []*lintFile
}

type lintFile struct {
	*ast.File
	path string
	test bool // a test file, or a helper that imports testing
}

// lintLoad parses every Go file of the module.
func lintLoad(fset *token.FileSet) ([]*lintPackage, error) {
	byDir := map[string]*lintPackage{}
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a node that runs here purges its files
		} else if err != nil {
			return err
		}
		base := d.Name()
		if d.IsDir() {
			_, err := os.Stat(filepath.Join(name, "go.mod"))
			ownModule := err == nil
			if name != "." && (base == "testdata" || base[0] == '.' || base[0] == '_' || ownModule) {
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(base) != ".go" {
			return nil
		}
		file, err := lintParse(fset, filepath.ToSlash(name), nil)
		if err != nil {
			return err
		}
		dir := path.Dir(file.path)
		if byDir[dir] == nil {
			byDir[dir] = &lintPackage{dir: dir, fset: fset}
		}
		byDir[dir].files = append(byDir[dir].files, file)
		return nil
	})
	var packages []*lintPackage
	for _, p := range byDir {
		packages = append(packages, p)
	}
	slices.SortFunc(packages, func(a, b *lintPackage) int { return strings.Compare(a.dir, b.dir) })
	return packages, err
}

// lintParse parses one file, from src if that is not nil.
func lintParse(fset *token.FileSet, name string, src any) (*lintFile, error) {
	parsed, err := parser.ParseFile(fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	f := &lintFile{File: parsed, path: name}
	f.test = strings.HasSuffix(name, "_test.go") || f.localName("testing") != ""
	return f, nil
}

// localName is what the file calls an imported package; empty if it does not
// import it.
func (f *lintFile) localName(importPath string) string {
	for _, spec := range f.Imports {
		if p, _ := strconv.Unquote(spec.Path.Value); p != importPath {
			continue
		}
		if spec.Name != nil {
			return spec.Name.Name
		}
		return path.Base(importPath)
	}
	return ""
}

// mentions calls report for each use of a package's function, called or not.
func (f *lintFile) mentions(importPath string, names []string, found func(sel *ast.SelectorExpr)) {
	local := f.localName(importPath)
	ast.Inspect(f.File, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok && slices.Contains(names, sel.Sel.Name) {
			if x, ok := sel.X.(*ast.Ident); ok && local != "" && x.Name == local {
				found(sel)
			}
		}
		return true
	})
}

// excuse returns what stands behind "// word:" in a comment on the line of pos
// or in the comment that ends on the line above.
func (p *lintPackage) excuse(f *lintFile, pos token.Pos, word string) string {
	line := func(pos token.Pos) int { return p.fset.Position(pos).Line }
	for _, group := range f.Comments {
		for _, c := range group.List {
			if line(c.Pos()) != line(pos) && line(group.End()) != line(pos)-1 {
				continue
			}
			if rest, ok := strings.CutPrefix(c.Text, "// "+word+":"); ok {
				return strings.TrimSpace(rest)
			}
		}
	}
	return ""
}

func lintCovers(prefix, importPath string) bool {
	return importPath == prefix || strings.HasPrefix(importPath, prefix+"/")
}

func lintImports(p *lintPackage, report lintReport) {
	known := false
	for _, e := range lintEdges {
		known = known || e.from == p.dir
	}
	if !known {
		report(p.files[0].Package, "package %s is not in lintEdges: give it a row for each thing it may import, with the reason", p.dir)
		return
	}
	for _, f := range p.files {
		for _, spec := range f.Imports {
			to, _ := strconv.Unquote(spec.Path.Value)
			if spec.Name != nil && spec.Name.Name == "." {
				report(spec.Pos(), "imports all names of %s: the other rules cannot see through a dot", to)
			}
			if to == lintModule {
				report(spec.Pos(), "imports the root, which is package main")
			} else if f.test && to == path.Join(lintModule, p.dir) {
				continue // an external test package
			} else if reason := lintForbidden(p.dir, to, f.test); reason != "" {
				report(spec.Pos(), "imports %s: %s", to, reason)
			}
		}
	}
}

// lintForbidden says why from may not import to; empty if it may.
func lintForbidden(from, to string, test bool) string {
	for _, r := range lintRefused {
		if lintCovers(r.to, to) && (r.from == from && !test || r.from == "*" && from != ".") {
			return r.why
		}
	}
	first, _, _ := strings.Cut(to, "/")
	std := !strings.Contains(first, ".") && first != lintModule
	for _, e := range lintEdges {
		if e.from == from && (test || !e.tests) && (e.to == lintStd && std || lintCovers(e.to, to)) {
			return ""
		}
	}
	return "lintEdges draws no such edge; go without, or add it with a reason"
}

func lintPackageDoc(p *lintPackage, report lintReport) {
	name := strings.TrimSuffix(p.files[0].Name.Name, "_test")
	for _, f := range p.files {
		if f.Doc != nil && (name == "main" || strings.HasPrefix(f.Doc.Text(), "Package "+name+" ")) {
			return
		}
	}
	report(p.files[0].Package, "no file of package %s has a package comment (beginning \"Package NAME\", main aside)", name)
}

// lintEnds matches the methods of log and zap that do not return.
var lintEnds = regexp.MustCompile(`^(Fatal|D?Panic)(f|ln|w)?$`)

func lintExits(p *lintPackage, report lintReport) {
	for _, f := range p.files {
		if f.test || f.path == "main.go" {
			continue
		}
		found := func(pos token.Pos, what string) {
			if p.excuse(f, pos, "panic") == "" {
				report(pos, "%s outside main.go: return an error, or say \"// panic: REASON\" above", what)
			}
		}
		for _, pkg := range []string{"os", "syscall"} {
			f.mentions(pkg, []string{"Exit"}, func(sel *ast.SelectorExpr) { found(sel.Pos(), pkg+".Exit") })
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			switch fun := call.Fun.(type) {
			case *ast.Ident:
				if fun.Name == "panic" {
					found(fun.Pos(), "panic")
				}
			case *ast.SelectorExpr:
				if lintEnds.MatchString(fun.Sel.Name) {
					found(fun.Sel.Pos(), fun.Sel.Name)
				}
			}
			return true
		})
	}
}

func lintSleep(p *lintPackage, report lintReport) {
	for _, f := range p.files {
		if !f.test || f.localName("testing/synctest") != "" {
			continue
		}
		f.mentions("time", []string{"Sleep"}, func(sel *ast.SelectorExpr) {
			report(sel.Pos(), "time.Sleep in a test that does not import testing/synctest")
		})
	}
}

func lintSkip(p *lintPackage, report lintReport) {
	for _, f := range p.files {
		if !f.test {
			continue
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name) {
				return true
			}
			reason := sel.Sel.Name != "SkipNow" && len(call.Args) > 0
			if reason {
				lit, ok := call.Args[0].(*ast.BasicLit)
				reason = !ok || len(strings.Trim(lit.Value, " \"`")) > 0
			}
			if !reason {
				report(call.Pos(), "%s without a reason", sel.Sel.Name)
			}
			return true
		})
	}
}

func lintDeterminism(p *lintPackage, report lintReport) {
	if p.dir != "kv" {
		return
	}
	isMap := p.maps()
	for _, f := range p.files {
		if f.test {
			continue
		}
		clock := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTicker", "NewTimer"}
		f.mentions("time", clock, func(sel *ast.SelectorExpr) {
			report(sel.Pos(), "time.%s: time enters the state as a command", sel.Sel.Name)
		})
		f.mentions("maps", []string{"All", "Keys", "Values"}, func(sel *ast.SelectorExpr) {
			if p.excuse(f, sel.Pos(), "order") == "" {
				report(sel.Pos(), "maps.%s has no order: sort, or say \"// order: REASON\" above", sel.Sel.Name)
			}
		})
		ast.Inspect(f.File, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				report(n.Pos(), "starts a goroutine: apply is one thread")
			case *ast.RangeStmt:
				if isMap(n.X) && p.excuse(f, n.Pos(), "order") == "" {
					report(n.Pos(), "ranges over a map: sort, or say \"// order: REASON\" above")
				}
			}
			return true
		})
	}
}

// maps tells which expressions of the package are maps. It type-checks the
// package alone, with empty packages for its imports and all errors ignored:
// quick, and blind only to a map whose type is declared elsewhere.
func (p *lintPackage) maps() func(ast.Expr) bool {
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}}
	config := types.Config{Importer: lintNoImports{}, Error: func(error) {}}
	var files []*ast.File
	for _, f := range p.files {
		if !f.test {
			files = append(files, f.File)
		}
	}
	config.Check(p.dir, p.fset, files, info)
	return func(x ast.Expr) bool {
		t := info.TypeOf(x)
		if t == nil {
			return false
		}
		_, ok := t.Underlying().(*types.Map)
		return ok
	}
}

type lintNoImports struct{}

func (lintNoImports) Import(importPath string) (*types.Package, error) {
	p := types.NewPackage(importPath, path.Base(importPath))
	p.MarkComplete()
	return p, nil
}

func lintLength(p *lintPackage, report lintReport) {
	for _, f := range p.files {
		lines := p.fset.File(f.Package).LineCount()
		if lines <= lintMaxLines {
			continue
		}
		argued := false
		if len(f.Comments) > 0 {
			for _, c := range f.Comments[0].List {
				rest, ok := strings.CutPrefix(c.Text, "// long:")
				argued = argued || ok && strings.TrimSpace(rest) != ""
			}
		}
		if !argued {
			report(f.Package, "%d lines: split it, or argue with \"// long: REASON\" in the file's first comment", lines)
		}
	}
}

func lintGoroutines(p *lintPackage, architecture string, report lintReport) {
	var rows []string // first cells
	for line := range strings.Lines(architecture) {
		if row, ok := strings.CutPrefix(line, "|"); ok {
			first, _, _ := strings.Cut(row, "|")
			rows = append(rows, first)
		}
	}
	for _, f := range p.files {
		if f.test {
			continue
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			if !lintStarts(n) {
				return true
			}
			reason := p.excuse(f, n.Pos(), "goroutine")
			name, _, _ := strings.Cut(reason, " ")
			name = strings.TrimRight(name, ".,:;")
			listed := func(row string) bool { return strings.Contains(row, name) }
			if name == "" {
				report(n.Pos(), "starts a goroutine without a name: say \"// goroutine: NAME\" above")
			} else if architecture != "" && !slices.ContainsFunc(rows, listed) {
				report(n.Pos(), "goroutine %s is in no row of the table in ARCHITECTURE.md (first column)", name)
			}
			return true
		})
	}
}

// lintStarts tells whether a node starts a goroutine: a go statement, or a call
// of time.AfterFunc, of a method Go, as WaitGroup has one, or of raftNode.spawn.
func lintStarts(n ast.Node) bool {
	if _, ok := n.(*ast.GoStmt); ok {
		return true
	}
	call, ok := n.(*ast.CallExpr)
	if !ok {
		return false
	}
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	x, ok := sel.X.(*ast.Ident)
	return (sel.Sel.Name == "Go" || sel.Sel.Name == "spawn") && len(call.Args) == 1 || sel.Sel.Name == "AfterFunc" && ok && x.Name == "time"
}

// TestLintCatches shows each rule a file that breaks it, and the excuse or the
// lawful twin that it accepts.
func TestLintCatches(t *testing.T) {
	const architecture = "sweeper is only prose\n\n| goroutine | owns |\n|---|---|\n| `raftNode.loop` | raft, not the printer |\n"
	long := strings.Repeat("\n", lintMaxLines) + "var last int\n"
	tests := []struct {
		rule, path, src string
		want            string // part of the finding; empty: none
	}{
		{"imports", "raft.go", `package main; import ("os"; "go.etcd.io/raft/v3/raftpb"; "pontoon/internal/wait")`, ""},
		{"imports", "raft.go", `package main; import "github.com/gorilla/mux"`, "draws no such edge"},
		{"imports", "raft.go", `package main; import "go.etcd.io/raft/v3x"`, "draws no such edge"},
		{"imports", "raft.go", `package main; import "pgregory.net/rapid"`, "draws no such edge"},
		{"imports", "raft_test.go", `package main; import "pgregory.net/rapid"`, ""},
		{"imports", "raft.go", `package main; import . "os"`, "a dot"},
		{"imports", "kv/a.go", `package kv; import "github.com/tidwall/btree"`, ""},
		{"imports", "kv/a.go", `package kv; import "pontoon/api"`, "draws no such edge"},
		{"imports", "kv/a.go", `package kv; import "pontoon"`, "imports the root"},
		{"imports", "kv/a.go", `package kv; import "go.etcd.io/raft/v3"`, "only the root knows raft"},
		{"imports", "kv/a_test.go", `package kv; import "go.etcd.io/raft/v3"`, "only the root knows raft"},
		{"imports", "kv/a.go", `package kv; import "math/rand/v2"`, "replicas would differ"},
		{"imports", "kv/a_test.go", `package kv_test; import ("math/rand/v2"; "pontoon/kv")`, ""},
		{"imports", "api/a.go", `package api; import "github.com/tidwall/btree"`, "draws no such edge"},
		{"imports", "client/a.go", `package client; import "pontoon/api"`, ""},
		{"imports", "client/a.go", `package client; import "pontoon/kv"`, "draws no such edge"},
		{"imports", "internal/new/a.go", `package new; import "os"`, "is not in lintEdges"},

		{"package doc", "kv/a.go", "// Package kv is it.\npackage kv", ""},
		{"package doc", "kv/a.go", "// It is kv.\npackage kv", "no file of package"},
		{"package doc", "main.go", "// Away from it.\n\npackage main", "no file of package"},
		{"package doc", "main.go", "// Pontoon is it.\npackage main", ""},

		{"exits", "main.go", `package main; import "os"; func f() { os.Exit(1) }`, ""},
		{"exits", "raft.go", `package main; import "os"; func f() { os.Exit(1) }`, "os.Exit outside"},
		{"exits", "raft.go", `package main; import std "os"; var exit = std.Exit`, "os.Exit outside"},
		{"exits", "kv/main.go", `package kv; import "syscall"; func f() { syscall.Exit(1) }`, "syscall.Exit outside"},
		{"exits", "raft.go", `package main; import "log"; func f() { log.Fatalf("") }`, "Fatalf outside"},
		{"exits", "raft.go", `package main; func (n *node) f() { n.logger.Panic("") }`, "Panic outside"},
		{"exits", "raft.go", `package main; func f() { panic("") }`, "panic outside"},
		{"exits", "raft.go", "package main\nfunc f() {\n\t// panic:\n\tpanic(1)\n}", "panic outside"},
		{"exits", "raft.go", "package main\nfunc f() {\n\t// panic: cannot happen\n\n\tpanic(1)\n}", "panic outside"},
		{"exits", "raft.go", "package main\nfunc f() {\n\t// panic: the caller\n\t// broke its promise\n\tpanic(1)\n}", ""},
		{"exits", "raft.go", "package main\nfunc f() {\n\tpanic(1) // panic: the caller broke its promise\n}", ""},
		{"exits", "raft_test.go", `package main; func f() { panic(1) }`, ""},
		{"exits", "internal/wait/help.go", `package wait; import "testing"; func f(t testing.TB) { t.Fatal() }`, ""},

		{"sleep", "raft_test.go", `package main; import "time"; func f() { time.Sleep(1) }`, "time.Sleep"},
		{"sleep", "raft_test.go", `package main; import . "os"; import clock "time"; func f() { clock.Sleep(1) }`, "time.Sleep"},
		{"sleep", "raft_test.go", `package main; import ("time"; "testing/synctest"); func f() { time.Sleep(1) }`, ""},
		{"sleep", "raft.go", `package main; import "time"; func f() { time.Sleep(1) }`, ""},

		{"skip", "raft_test.go", `package main; func f() { t.Skip() }`, "Skip without"},
		{"skip", "raft_test.go", `package main; func f() { t.Skip("") }`, "Skip without"},
		{"skip", "raft_test.go", `package main; func f() { t.SkipNow() }`, "SkipNow without"},
		{"skip", "raft_test.go", `package main; func f() { t.Skip("needs root"); t.Skipf(why, 1) }`, ""},

		{"deterministic kv", "kv/a.go", `package kv; import "time"; func f() { g(time.Now) }`, "time.Now"},
		{"deterministic kv", "kv/a.go", `package kv; import "time"; func f() time.Duration { return time.Second }`, ""},
		{"deterministic kv", "kv/a.go", `package kv; func f() { go f() }`, "starts a goroutine"},
		{"deterministic kv", "kv/a.go", `package kv; type s struct { m map[string]int }; func (s *s) f() { for range s.m {} }`, "ranges over a map"},
		{"deterministic kv", "kv/a.go", `package kv; import "x/y"; type m map[string]y.T; var v m; func f() { y.G(); for range v {} }`, "ranges over a map"},
		{"deterministic kv", "kv/a.go", `package kv; import "maps"; func f(m map[int]int) { for range maps.Keys(m) {} }`, "maps.Keys"},
		{"deterministic kv", "kv/a.go", "package kv\nfunc f(m map[int]int) {\n\t// order: a sum has none\n\tfor range m {\n\t}\n}", ""},
		{"deterministic kv", "kv/a.go", `package kv; func f(s []int) { for range s {}; for range len(s) {} }`, ""},
		{"deterministic kv", "kv/a_test.go", `package kv; func f(m map[int]int) { for range m {} }`, ""},
		{"deterministic kv", "raft.go", `package main; func f(m map[int]int) { for range m {} }`, ""},

		{"long file", "raft.go", "package main" + long, "801 lines"},
		{"long file", "raft.go", "// Raft.\n\npackage main\n// long: too late\n" + long, "lines"},
		{"long file", "raft.go", "package main" + long[1:], ""},
		{"long file", "raft.go", "package main\n\n// The loop.\n//\n// long: one select, one owner\n" + long, ""},

		{"goroutines", "raft.go", "package main\nfunc f() {\n\tgo f()\n}", "without a name"},
		{"goroutines", "raft.go", "package main\nfunc f() {\n\twg.Go(f)\n}", "without a name"},
		{"goroutines", "raft.go", "package main\nfunc f() {\n\ttime.AfterFunc(1, f)\n}", "without a name"},
		{"goroutines", "raft.go", "package main\nfunc f() {\n\tn.spawn(f)\n}", "without a name"},
		{"goroutines", "raft.go", "package main\nfunc f() {\n\t// goroutine: sweeper\n\tgo f()\n}", "in no row"},
		{"goroutines", "raft.go", "package main\nfunc f() {\n\t// goroutine: printer\n\tgo f()\n}", "in no row"},
		{"goroutines", "raft.go", "package main\nfunc f() {\n\t// goroutine: raftNode.loop, until stop\n\tgo f()\n}", ""},
		{"goroutines", "main.go", "package main\nfunc f() {\n\tcontext.AfterFunc(ctx, cancel)\n}", ""},
		{"goroutines", "raft_test.go", "package main\nfunc f() {\n\tgo f()\n}", ""},
	}
	caught := map[string]bool{}
	for i, tt := range tests {
		t.Run(fmt.Sprintf("%s/%d", tt.rule, i), func(t *testing.T) {
			fset := token.NewFileSet()
			file, err := lintParse(fset, tt.path, tt.src)
			if err != nil {
				t.Fatal(err)
			}
			rules := lintRules(architecture)
			rule := rules[slices.IndexFunc(rules, func(r lintRule) bool { return r.name == tt.rule })]
			var got []string
			rule.check(&lintPackage{dir: path.Dir(tt.path), fset: fset, files: []*lintFile{file}}, func(_ token.Pos, format string, args ...any) {
				got = append(got, fmt.Sprintf(format, args...))
			})
			switch all := strings.Join(got, "\n"); {
			case tt.want == "" && all != "":
				t.Errorf("finds %q in lawful code:\n%.200s", all, tt.src)
			case tt.want != "" && (len(got) != 1 || !strings.Contains(all, tt.want)):
				t.Errorf("finds %q, want one finding with %q, in:\n%.200s", all, tt.want, tt.src)
			}
			caught[tt.rule] = caught[tt.rule] || len(got) > 0
		})
	}
	for _, rule := range lintRules("") {
		if !caught[rule.name] && !t.Failed() {
			t.Errorf("no example breaks the rule %q", rule.name)
		}
	}
}
