package main

// A test of the plan: calls between the files go down only. It finds out which
// file's names each file uses, and compares that with the order that CONTRIBUTING.md
// shows.

import (
	"bytes"
	"cmp"
	"fmt"
	"go/ast"
	"go/build"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// plan is the order of the files, top to bottom, word for word as CONTRIBUTING.md
// has it. A file uses only names of files below it.
const plan = `main.go            the process: flags, start and stop, signals, exit status

check.go           the test of a relay from outside: what is asked for, and the order of its steps
check_meet.go      ... two clients meet through the relay
check_dial.go      ... the relay is dialled
check_endpoint.go  ... the identity endpoint is asked
check_client.go    ... the clients that it plays
check_report.go    ... what it prints

httpapi.go         the HTTP endpoint; knows nothing of libp2p
systemd.go         what the service manager is told
logs.go            how log lines look, and the libraries' logs, joined to ours
outlet.go          stdout and stderr, for which nobody waits

relay.go           the libp2p node: put together, drained, closed
metrics.go         the metrics, if the operator wants them

dht.go             a DHT request, from its stream to the answer
answers.go         whom answers name
bridge_route.go    the bridge: where a datagram of a client goes
bridge_dial.go     ... how two clients begin
bridge_offers.go   ... whom a client may dial over it
bridge_ids.go      ... what is read of a packet
bridge.go          ... the flows of the clients' own packets between them
groups.go          which devices belong together
records.go         the DHT's values, and how many are kept
reach.go           where the relay can be reached, as clients are told it
federation.go      other relays
names.go           what DNS names lead to
circuits.go        circuits, how many there may be, and their shares of bandwidth
comeback.go        a device that comes back while its old connections still count
peers.go           who is connected, and at which address

config.go          what an operator can choose: flags, help, version
sockets.go         the UDP sockets
sockets_linux.go   ... many datagrams of one sender at a time
sockets_other.go   ... or not
gate.go            which packets of handshakes reach quic-go
paths.go           what is sent to addresses that nobody has proven
sockets_udp.go     ... one socket, and the one that reads one datagram at a time
networks.go        where clients are now, and how many connections each network has
pieces.go          what clients make quic-go keep in small pieces
flight.go          what has been sent and not acknowledged
budgets.go         how much CPU one network can take
shares.go          streams and memory of each client's own
host.go            a libp2p host that speaks QUIC alone

identity.go        the key file, and the certificate
addrs.go           what an address may be
limits.go          every bound
memory.go          how much memory there is, and what the Go runtime may take of it
counters.go        what is counted
protocol.go        the names on the wire, and the identity endpoint's answer
container.go       what is different in a container
system_unix.go     what Unix has and Windows lacks
system_windows.go  ... and what Windows does without it
`

// planOrder returns the files of plan, top to bottom.
func planOrder() (order []string) {
	for line := range strings.Lines(plan) {
		if fields := strings.Fields(line); len(fields) > 0 {
			order = append(order, fields[0])
		}
	}
	return order
}

// fileUse is a name that one file uses and another declares.
type fileUse struct {
	file     string
	line     int
	name     string
	declared string // the file
}

// fileUses returns every use of a name that another file of the package declares:
// functions, types, constants, variables, and the fields and methods of the
// package's own types. A method belongs to the file that declares it, and to the
// one that declares its receiver's type. imp may be nil, and type errors are
// passed over: what can't be resolved is not reported.
func fileUses(fset *token.FileSet, files []*ast.File, imp types.Importer) (uses []fileUse) {
	info := &types.Info{Uses: make(map[*ast.Ident]types.Object)}
	conf := types.Config{Importer: imp, Error: func(error) {}}
	pkg, _ := conf.Check("main", fset, files, info)
	for ident, obj := range info.Uses {
		if obj.Pkg() != pkg {
			continue
		}
		declared := []types.Object{obj}
		if f, ok := obj.(*types.Func); ok && f.Signature().Recv() != nil {
			t := f.Signature().Recv().Type()
			if p, ok := t.(*types.Pointer); ok {
				t = p.Elem()
			}
			if named, ok := t.(*types.Named); ok {
				declared = append(declared, named.Obj())
			}
		}
		at := fset.Position(ident.Pos())
		seen := map[string]bool{at.Filename: true}
		for _, d := range declared {
			if file := fset.Position(d.Pos()).Filename; file != "" && !seen[file] {
				seen[file] = true
				uses = append(uses, fileUse{at.Filename, at.Line, ident.Name, file})
			}
		}
	}
	return uses
}

// against returns a sentence for the first use of each name that goes against the
// order: up, or between the check, whose files begin with "check", and the node, which
// is what stands from relay.go to config.go.
func against(order []string, uses []fileUse) (wrong []string) {
	slices.SortFunc(uses, func(a, b fileUse) int {
		return cmp.Or(cmp.Compare(a.file, b.file), cmp.Compare(a.line, b.line), cmp.Compare(a.name, b.name), cmp.Compare(a.declared, b.declared))
	})
	floor := func(file string) int { return slices.Index(order, file) }
	isCheck := func(file string) bool { return strings.HasPrefix(file, "check") }
	seen := make(map[fileUse]bool)
	for _, u := range uses {
		which := fileUse{file: u.file, name: u.name, declared: u.declared}
		if seen[which] {
			continue
		}
		seen[which] = true
		var why string
		switch {
		case floor(u.declared) < floor(u.file):
			why = "up"
		case isCheck(u.declared) && !isCheck(u.file) && (u.file != "main.go" || u.declared != "check.go"):
			why = "only main.go uses the check, and only check.go of it"
		case isCheck(u.file) && floor(u.declared) >= floor("relay.go") && floor(u.declared) < floor("config.go"):
			why = "the check uses nothing of the node"
		default:
			continue
		}
		wrong = append(wrong, fmt.Sprintf("%s:%d uses %s (%s): %s", u.file, u.line, u.name, u.declared, why))
	}
	return wrong
}

// exported reads the types of imported packages from the export data of a build.
func exported(t *testing.T, fset *token.FileSet) types.Importer {
	t.Helper()
	list := exec.Command("go", "list", "-export", "-deps", "-f", "{{if .Export}}{{.ImportPath}} {{.Export}}{{end}}", ".")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	files := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		files[path] = file
	}
	return importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) {
		if files[path] == "" {
			return nil, fmt.Errorf("no export data for %s", path)
		}
		return os.Open(files[path])
	})
}

// A reader can take the files one by one, from the bottom up, only as long as none
// uses what is above it.
func TestCallsGoDown(t *testing.T) {
	order := planOrder()
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	sources = slices.DeleteFunc(sources, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
	for _, name := range sources {
		if !slices.Contains(order, name) {
			t.Errorf("%s has no place in the plan", name)
		}
	}
	for _, name := range order {
		if !slices.Contains(sources, name) {
			t.Errorf("the plan has %s, which is not there", name)
		}
	}

	fset := token.NewFileSet()
	imp := exported(t, fset)
	var uses []fileUse
	// The files of one system are not checked on another. The imported packages are
	// those of this one: what they lack elsewhere is passed over.
	for _, goos := range []string{runtime.GOOS, "linux", "darwin", "windows"} {
		system := build.Default
		system.GOOS, system.CgoEnabled = goos, false
		found, err := system.ImportDir(".", 0)
		if err != nil {
			t.Fatal(err)
		}
		var files []*ast.File
		for _, name := range found.GoFiles {
			file, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, file)
		}
		uses = append(uses, fileUses(fset, files, imp)...)
	}
	if len(uses) < 1000 {
		t.Errorf("only %d uses of names between files are found: the types are not resolved", len(uses))
	}
	for _, use := range against(order, uses) {
		t.Error(use)
	}
}

// A test that cannot fail would keep no order.
func TestCallsThatGoUpAreFound(t *testing.T) {
	fset := token.NewFileSet()
	var files []*ast.File
	for _, source := range []struct{ name, text string }{
		{"main.go", `package main
			func main() { check(); step() }`},
		{"check.go", `package main
			func check() { step(); node() }`},
		{"check_step.go", `package main
			func step() { bottom() }`},
		{"relay.go", `package main
			type thing struct{ field int }
			func (thing) method() {}
			func node() { bottom() }
			const constant = 1
			var variable int`},
		{"maker.go", `package main
			func newThing() (t thing) { return t }
			func local() { node := func() {}; node() }`},
		{"config.go", `package main
			func bottom() {
				node()
				variable = constant
				x := newThing().field
				newThing().method()
				step()
				unknown.isPassedOver()
			}
			func (thing) another() {}`},
	} {
		file, err := parser.ParseFile(fset, source.name, source.text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	order := []string{"main.go", "check.go", "check_step.go", "relay.go", "maker.go", "config.go"}
	got := against(order, fileUses(fset, files, nil))
	want := []string{
		"check.go:2 uses node (relay.go): the check uses nothing of the node",
		"config.go:3 uses node (relay.go): up",
		"config.go:4 uses constant (relay.go): up",
		"config.go:4 uses variable (relay.go): up",
		"config.go:5 uses field (relay.go): up",
		"config.go:5 uses newThing (maker.go): up",
		"config.go:6 uses method (relay.go): up",
		"config.go:7 uses step (check_step.go): up",
		"config.go:10 uses thing (relay.go): up",
		"main.go:2 uses step (check_step.go): only main.go uses the check, and only check.go of it",
		"maker.go:2 uses thing (relay.go): up",
	}
	if !slices.Equal(got, want) {
		t.Errorf("uses against the order:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A stranger who opens any file learns first what it is for.
func TestEveryFileSaysWhatItIsFor(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !opens(t, name, source) {
			t.Errorf("%s has no comment before or right after its package clause", name)
		}
	}
	for source, want := range map[string]bool{
		"// Command x does this.\npackage main\n":                       true,
		"//go:build linux\n\npackage main\n\n// This.\n\nfunc f()":      true,
		"package main\n\nfunc f()":                                      false,
		"//go:build linux\n\npackage main\n\nfunc f()":                  false,
		"package main\n\nimport \"fmt\"\n\n// f is too late.\nfunc f()": false,
		"package main\n\n// f is its doc comment.\nfunc f()":            false,
	} {
		if got := opens(t, "x.go", []byte(source)); got != want {
			t.Errorf("opening comment of %q: %v, want %v", source, got, want)
		}
	}
}

// opens reports whether a file has an opening comment: right before its package
// clause, or after it and not the doc comment of what follows.
func opens(t *testing.T, name string, source []byte) bool {
	t.Helper()
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, source, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	if file.Doc.Text() != "" {
		return true
	}
	for _, comment := range file.Comments {
		if comment.Pos() < file.Name.End() || comment.Text() == "" {
			continue
		}
		end := fset.Position(comment.End()).Line
		return len(file.Decls) == 0 || comment.End() < file.Decls[0].Pos() && end+1 < fset.Position(file.Decls[0].Pos()).Line
	}
	return false
}

// CONTRIBUTING.md shows the order that is tested.
func TestContributingShowsThePlan(t *testing.T) {
	page, err := os.ReadFile("CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(page, []byte("```\n"+plan+"```\n")) {
		t.Errorf("CONTRIBUTING.md does not show the plan as it is:\n%s", plan)
	}
}
