package main

// What README and docs promise: that their commands are commands, that their links lead
// somewhere, and that they, --help and the man page say the same.

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// pages returns the text of every page by its name.
func pages(t *testing.T) map[string]string {
	t.Helper()
	names, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := make(map[string]string)
	for _, name := range append(names, more...) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		texts[filepath.ToSlash(name)] = string(text)
	}
	return texts
}

var (
	codeBlock  = regexp.MustCompile("(?ms)^ *```(\\w*)\n(.*?)^ *```")
	pageLink   = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	pageTitle  = regexp.MustCompile(`(?m)^#+ (.*)$`)
	notInTitle = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// shellLines returns the commands in the sh blocks of a page. A backslash joins lines.
func shellLines(text string) (lines []string) {
	for _, block := range codeBlock.FindAllStringSubmatch(text, -1) {
		if block[1] != "sh" {
			continue
		}
		for line := range strings.Lines(strings.ReplaceAll(block[2], "\\\n", " ")) {
			if line = strings.TrimSpace(line); line != "" {
				lines = append(lines, line)
			}
		}
	}
	return lines
}

// A reader who follows a link finds a page, and the place in it.
func TestLinksLeadSomewhere(t *testing.T) {
	texts := pages(t)
	anchors := func(name string) (all []string) {
		for _, title := range pageTitle.FindAllStringSubmatch(codeBlock.ReplaceAllString(texts[name], ""), -1) {
			plain := notInTitle.ReplaceAllString(strings.ToLower(title[1]), "")
			all = append(all, strings.ReplaceAll(plain, " ", "-"))
		}
		return all
	}
	// What archives and packages have: see .goreleaser.yaml.
	shipped := regexp.MustCompile(`^(README|SECURITY|CHANGELOG)\.md$|^docs/[^/]*\.md$|^contrib(/[^/]*)?$`)
	links := 0
	for name, text := range texts {
		for _, match := range pageLink.FindAllStringSubmatch(codeBlock.ReplaceAllString(text, ""), -1) {
			link, anchor, _ := strings.Cut(match[1], "#")
			if source, ok := strings.CutPrefix(link, "https://github.com/PrivStackApp/privstack-relay/blob/main/"); ok {
				if _, err := os.Stat(source); err != nil {
					t.Errorf("%s: the link %s leads nowhere", name, match[1])
				}
			}
			if strings.Contains(link, "://") {
				continue
			}
			links++
			target := name
			if link != "" {
				target = filepath.ToSlash(filepath.Join(filepath.Dir(name), link))
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: the link %s leads nowhere", name, match[1])
			} else if name != "CONTRIBUTING.md" && !shipped.MatchString(target) {
				t.Errorf("%s: the link %s is dead in archives and packages, which do not have %s", name, match[1], target)
			} else if anchor != "" && !slices.Contains(anchors(target), anchor) {
				t.Errorf("%s: the link %s leads to no title of %s: %q", name, match[1], target, anchors(target))
			}
		}
	}
	if links < 30 {
		t.Errorf("only %d links are found", links)
	}
}

// What operators copy is a command line that this version takes.
func TestCommandsInDocsAreTaken(t *testing.T) {
	taken := 0
	for name, text := range pages(t) {
		flags := func(args string) {
			taken++
			if _, err := parseFlags(strings.Fields(args)); err != nil {
				t.Errorf("%s: privstack-relay %s: %v", name, args, err)
			}
		}
		for _, match := range regexp.MustCompile(`RELAY_FLAGS="([^"]*)"`).FindAllStringSubmatch(text, -1) {
			flags(match[1])
		}
		for _, line := range shellLines(text) {
			if runtime.GOOS != "windows" {
				if out, err := exec.Command("sh", "-nc", line).CombinedOutput(); err != nil {
					t.Errorf("%s: %s: %s", name, line, out)
				}
			}
			// The relay's own words follow its name, or that of its image.
			line, _, _ = strings.Cut(line, " | ")
			_, args, found := strings.Cut(line+" ", "ghcr.io/privstackapp/privstack-relay ")
			if after, ok := strings.CutPrefix(line+" ", "privstack-relay "); ok {
				args, found = after, true
			}
			if !found {
				continue
			}
			words := strings.Fields(args)
			switch {
			case len(words) > 0 && words[0] == "check":
				taken++
				if _, err := parseCheckTarget(words[len(words)-1]); err != nil {
					t.Errorf("%s: %s: %v", name, line, err)
				}
			case len(words) > 0 && words[0] == "healthy":
				flags(strings.Join(words[1:], " "))
			default:
				flags(args)
			}
		}
	}
	if taken < 12 {
		t.Errorf("only %d command lines of the relay are found", taken)
	}
}

// The names in `go test -run NAME` exist, so that nobody is told "no tests to run".
func TestTestsNamedInDocsExist(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz)\w+)\(`).FindAllStringSubmatch(string(text), -1) {
			names = append(names, match[1])
		}
	}
	for name, text := range pages(t) {
		for _, match := range regexp.MustCompile(`go test [^\x60\n]*?-(?:run|bench|fuzz) '?([\w^$\\|/]+)'?`).FindAllStringSubmatch(text, -1) {
			for pattern := range strings.SplitSeq(strings.ReplaceAll(match[1], `\|`, "|"), "|") {
				pattern, _, _ = strings.Cut(pattern, "/")
				if pattern == "^$" {
					continue
				}
				if !slices.ContainsFunc(names, regexp.MustCompile(pattern).MatchString) {
					t.Errorf("%s: no test matches %s in %s", name, pattern, match[0])
				}
			}
		}
	}
}

// README, docs and man page say of each flag what --help says.
func TestHelpIsTheSameEverywhere(t *testing.T) {
	texts := pages(t)
	for name, text := range map[string]string{"README.md": usage, "docs/troubleshooting.md": checkUsage} {
		if !strings.Contains(texts[name], "\n```\n"+text+"```\n") {
			t.Errorf("%s does not show this usage text as --help prints it:\n%s", name, text)
		}
	}
	if runtime.GOOS != "linux" {
		t.Skip("packaging/prepare needs GNU date and awk")
	}
	page := manPage(t)
	if strings.Contains(page, "--") {
		t.Error("the man page has hyphens that are not escaped")
	}
	page = strings.Join(strings.Fields(strings.ReplaceAll(page, `\-`, "-")), " ")
	entries := 0
	for _, text := range []string{usage, checkUsage} {
		// An entry begins with a flag, in the first columns. What follows is indented further.
		for _, entry := range regexp.MustCompile(`(?m)^  (?:-\w,|   ) --.*(?:\n {20,}.*)*`).FindAllString(text, -1) {
			entries++
			words := strings.Join(strings.Fields(entry), " ")
			if !strings.Contains(page, words) {
				t.Errorf("the man page does not say %q", words)
			}
		}
	}
	if entries < 14 {
		t.Errorf("only %d flags are found in the usage texts", entries)
	}
	for _, title := range []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "FILES", "SIGNALS", "EXIT STATUS", "EXAMPLES"} {
		if !strings.Contains(page, ".SH "+title) {
			t.Errorf("the man page has no section %s", title)
		}
	}
}

// manPage returns the man page that packaging/prepare makes, in a copy.
func manPage(t *testing.T) string {
	t.Helper()
	script := `cp -r packaging config.go check.go LICENSE privstack-relay.service "$0" && rm -rf "$0/packaging/out" &&
		"$0"/packaging/prepare 1.2.3 1700000000 && gzip -dc "$0"/packaging/out/privstack-relay.8.gz`
	out, err := exec.Command("sh", "-ec", script, t.TempDir()).CombinedOutput()
	if err != nil {
		t.Fatalf("packaging/prepare: %v\n%s", err, out)
	}
	return string(out)
}

// The commands that need only a running relay run, on a host of the lab where it has its
// usual ports and name.
func TestCommandsInDocsRun(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	ns := l.public("relay", "11.0.0.1/8")
	l.relay(ns, nil, "--announce=relay.example.org")
	bin := t.TempDir()
	relay, err := filepath.Abs(command(t).Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(relay, filepath.Join(bin, "privstack-relay")); err != nil {
		t.Fatal(err)
	}
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, []byte("127.0.0.1 localhost\n11.0.0.1 relay.example.org\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ran := 0
	for name, text := range pages(t) {
		for _, line := range shellLines(text) {
			words := strings.Fields(line)
			switch {
			case words[0] == "privstack-relay" && len(words) > 1 && (words[1] == "check" || words[1] == "healthy"):
			case words[0] == "curl" && !strings.Contains(line, "https://"):
			default:
				continue
			}
			if _, err := exec.LookPath("jq"); err != nil && strings.Contains(line, "jq") {
				continue
			}
			if _, err := exec.LookPath("curl"); err != nil && words[0] == "curl" {
				continue
			}
			ran++
			cmd := exec.Command("ip", "netns", "exec", ns, "unshare", "--mount", "sh", "-ec", `mount --bind "$0" /etc/hosts; `+line, hosts)
			cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %s: %v\n%s", name, line, err, out)
			}
		}
	}
	if ran == 0 {
		t.Error("no command is found")
	}
}
