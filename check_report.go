package main

// What `check` says: the report, its steps, and how they look on a terminal.

import (
	"fmt"
	"maps"
	"strings"
	"time"
	"unicode"
)

// The results of a step, as they are in JSON.
const (
	checkPassed  = "ok"
	checkFailed  = "failed"
	checkSkipped = "skipped" // it does not apply here, or needs a step that failed
)

// checkMarks stand for the results on a terminal.
var checkMarks = map[string]string{checkPassed: "✓", checkFailed: "✗", checkSkipped: "–"}

// checkReport is the JSON document. Monitoring relies on its names. Each step is
// about the relay; none is about the network in which the check runs.
type checkReport struct {
	Target  string      `json:"target"`  // as it was given
	PeerID  string      `json:"peer_id"` // promised, or else found; "" if neither
	OK      bool        `json:"ok"`      // no step failed
	Millis  float64     `json:"ms"`
	Version string      `json:"version"` // of the program that checked
	Steps   []checkStep `json:"steps"`   // all of them, always in the same order
	failed  int         // how many of them
}

// checkStep says how one step ended.
type checkStep struct {
	Name   string   `json:"name"`
	Result string   `json:"result"`
	Millis float64  `json:"ms"` // 0 if skipped
	Detail string   `json:"detail"`
	Lines  []string `json:"lines,omitempty"` // more details, one line each
	diagnosis
	Values map[string]any `json:"values,omitempty"` // the numbers and addresses in Detail, for machines

	blocks string // why the steps that follow make no sense; "" if they do
}

// diagnosis is a likely cause, and what to run on the relay's machine.
type diagnosis struct {
	Cause string   `json:"cause,omitempty"`
	Try   []string `json:"try,omitempty"`
}

func likely(cause string, try ...string) diagnosis { return diagnosis{cause, try} }

func stepPassed(format string, args ...any) checkStep {
	return checkStep{Result: checkPassed, Detail: fmt.Sprintf(format, args...)}
}

func stepSkipped(format string, args ...any) checkStep {
	return checkStep{Result: checkSkipped, Detail: fmt.Sprintf(format, args...)}
}

func stepFailed(why diagnosis, format string, args ...any) checkStep {
	return checkStep{Result: checkFailed, Detail: fmt.Sprintf(format, args...), diagnosis: why}
}

func (s checkStep) with(values map[string]any) checkStep {
	s.Values = values
	return s
}

func (s checkStep) blocking(why string) checkStep {
	s.blocks = why
	return s
}

// text lays s out for a terminal of 100 columns.
func (s checkStep) text() string {
	const indent, width = 26, 100
	took := ""
	if s.Result != checkSkipped {
		took = fmt.Sprintf("%.0f ms", s.Millis)
	}
	paragraphs := append([]string{s.Detail}, s.Lines...)
	if s.Cause != "" {
		paragraphs = append(paragraphs, "likely: "+s.Cause)
	}
	for _, command := range s.Try {
		paragraphs = append(paragraphs, "try: "+command)
	}
	var lines []string
	for _, p := range paragraphs {
		lines = append(lines, wrapText(p, width-indent)...)
	}
	return fmt.Sprintf("%s %-13s %8s  ", checkMarks[s.Result], s.Name, took) +
		strings.Join(lines, "\n"+strings.Repeat(" ", indent)) + "\n"
}

// cleaned returns s with all its texts cleaned: see clean. The steps need not do so
// themselves.
func (s checkStep) cleaned() checkStep {
	s.Detail, s.Cause, s.Lines, s.Try = clean(s.Detail), clean(s.Cause), cleanAll(s.Lines), cleanAll(s.Try)
	s.Values = maps.Clone(s.Values)
	for name, value := range s.Values {
		switch v := value.(type) {
		case string:
			s.Values[name] = clean(v)
		case []string:
			s.Values[name] = append([]string{}, cleanAll(v)...) // [] in JSON, never null
		}
	}
	return s
}

func cleanAll(texts []string) (cleaned []string) {
	for _, text := range texts {
		cleaned = append(cleaned, clean(text))
	}
	return cleaned
}

// clean makes text from the other side harmless to a terminal: nothing in it controls the
// terminal or turns the direction of the text. It also cuts it.
func clean(s string) string {
	runes := []rune(s)
	runes = runes[:min(len(runes), 600)]
	for i, r := range runes {
		if !unicode.IsPrint(r) {
			runes[i] = '?'
		}
	}
	return string(runes)
}

// wrapText breaks s into lines of at most width characters, between words if possible.
func wrapText(s string, width int) (lines []string) {
	line := []rune(s)
	for len(line) > width {
		cut := width
		for cut > 0 && line[cut] != ' ' {
			cut--
		}
		if cut == 0 { // one long word
			cut = width
		}
		lines = append(lines, string(line[:cut]))
		line = []rune(strings.TrimLeft(string(line[cut:]), " "))
	}
	return append(lines, string(line))
}

// millis returns d in milliseconds, to the microsecond.
func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// tryFlag returns how to give the relay one more flag.
func tryFlag(flag string) []string {
	return []string{
		"add " + flag + " to RELAY_FLAGS in /etc/default/privstack-relay",
		"systemctl restart privstack-relay",
	}
}

// tryOpen returns how to open a port in the machine's firewall. network is "tcp" or "udp".
func tryOpen(port, network string) []string {
	return []string{
		"ufw allow " + port + "/" + network,
		"firewall-cmd --permanent --add-port=" + port + "/" + network + " && firewall-cmd --reload  # Fedora and its kin",
		"netsh advfirewall firewall add rule name=privstack-relay dir=in action=allow protocol=" + network + " localport=" + port + "  # Windows",
	}
}

// tryStatus shows whether the relay runs, and its last log lines.
const tryStatus = "systemctl status privstack-relay  # in a container: podman logs relay"
