package main

// privstack-relay check: the operator's test of a running relay, from anywhere.
// It does over the network what two clients do, step by step, and says of each
// step that fails what is likely wrong and what to run. Whatever the other side
// does, each step has a deadline and the whole has one.
//
// It leaves behind one record that expires, and no file. It dials the host that
// was asked for and what its identity endpoint announces, maxCheckDials
// addresses at most. The steps are in checksteps.go, the clients that they
// play in checkhost.go.

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

const (
	// checkTimeout bounds a whole check, which with the time to close is 30 s at
	// most: what checkUsage promises to monitors.
	checkTimeout = 28 * time.Second

	// What each kind of step may take at most. checkDialTime is go-libp2p's own
	// timeout of a QUIC handshake.
	checkAskTime     = 3 * time.Second
	checkDialTime    = 5 * time.Second
	checkCircuitTime = 12 * time.Second

	// checkEchoBytes go through the circuit and back.
	checkEchoBytes = 1 << 20

	// checkRecordTTL is what the record that is left behind says of its life, in
	// seconds. This relay keeps it for maxRecordAge nonetheless, or until it needs
	// the room; its key is random, so no client asks for it.
	checkRecordTTL = 60

	// maxCheckDials bounds the addresses that are dialled, maxCheckListed those
	// of the endpoint that are looked at, and maxCheckIPs what a name stands for,
	// in each family. maxCheckOwn of the dials are made with the identity that is
	// used later: with that connection they stay within connsPerPeer.
	maxCheckDials  = 8
	maxCheckOwn    = connsPerPeer - 2
	maxCheckListed = maxAnnounce + 2
	maxCheckIPs    = 2

	// maxIdentityBody bounds the endpoint's answer, in bytes: eight announced
	// names of 253 characters are 3 KiB.
	maxIdentityBody = 64 << 10

	// The ports of a relay of which nothing else is known.
	checkPort     = 4001
	checkHTTPPort = "4002"
)

const checkUsage = `privstack-relay check - test a running relay, from anywhere

Usage: privstack-relay check [--json] RELAY

RELAY is what clients are given:
  relay.example.org             a host name or IP address; HOST:PORT where the
  203.0.113.7  2001:db8::7      identity endpoint is not on port 4002
  https://relay.example.org     the identity endpoint behind a reverse proxy
  /ip4/203.0.113.7/udp/4001/quic-v1/p2p/12D3KooW...
                                a bootstrap address: needs no identity endpoint

      --json                    one JSON document, for monitoring
  -h, --help                    print this help

It does what clients do and takes half a minute at most. Exit status: 0 all is
well, 1 a step failed, 2 wrong command line.
`

// runCheck is the whole subcommand: args are those after its name. nil means
// that no step failed.
func runCheck(ctx context.Context, args []string, stdout io.Writer) error {
	fs := flag.NewFlagSet("check", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	asJSON := fs.Bool("json", false, "")
	err := fs.Parse(args)
	if err == nil && fs.NArg() > 1 {
		// A flag may come after the relay too.
		err = fs.Parse(append(slices.Clone(fs.Args()[1:]), fs.Arg(0)))
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		_, err = io.WriteString(stdout, checkUsage)
		return err
	case err != nil:
		return usageError{"check: " + err.Error()}
	case fs.NArg() != 1:
		return usageError{"check needs one relay: a host name, an address or a URL; see privstack-relay check --help"}
	}
	target, err := parseCheckTarget(fs.Arg(0))
	if err != nil {
		return usageError{fmt.Sprintf("check %s: %v", clean(fs.Arg(0)), err)}
	}
	// What goes wrong is in the steps; the libraries' warnings would be twice.
	joinLibraryLogs(slog.DiscardHandler, false)

	if !*asJSON {
		fmt.Fprintf(stdout, "Checking %s\n\n", clean(fs.Arg(0)))
	}
	r, err := checkRelay(ctx, target, func(s checkStep) {
		if !*asJSON {
			io.WriteString(stdout, s.text())
		}
	})
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(r)
	} else if r.OK {
		_, err = fmt.Fprintln(stdout, "\nAll is well.")
	}
	if !r.OK {
		return fmt.Errorf("check: %d of %d steps failed", r.count(checkFailed), len(r.Steps))
	}
	return err
}

// The results of a step, as they are in JSON.
const (
	checkPassed  = "ok"
	checkFailed  = "failed"
	checkSkipped = "skipped" // does not apply here, or needs a step that failed
)

// checkReport is the JSON document. Monitoring relies on its names.
type checkReport struct {
	Target  string      `json:"target"`  // as it was given
	PeerID  string      `json:"peer_id"` // promised, or else found; "" if neither
	OK      bool        `json:"ok"`      // no step failed
	Millis  float64     `json:"ms"`
	Version string      `json:"version"` // of the program that checked
	Steps   []checkStep `json:"steps"`   // all of them, always in the same order
}

func (r checkReport) count(result string) (n int) {
	for _, s := range r.Steps {
		if s.Result == result {
			n++
		}
	}
	return n
}

// checkStep is what came of one step.
type checkStep struct {
	Name   string         `json:"name"`
	Result string         `json:"result"`
	Millis float64        `json:"ms"` // 0 if skipped
	Detail string         `json:"detail"`
	Lines  []string       `json:"lines,omitempty"`  // more details, one line each
	Cause  string         `json:"cause,omitempty"`  // the likely one of a failure
	Try    []string       `json:"try,omitempty"`    // commands, to be run on the relay's machine
	Values map[string]any `json:"values,omitempty"` // numbers and addresses in Detail, for machines
}

func passed(format string, args ...any) checkStep {
	return checkStep{Result: checkPassed, Detail: fmt.Sprintf(format, args...)}
}

func skipped(format string, args ...any) checkStep {
	return checkStep{Result: checkSkipped, Detail: fmt.Sprintf(format, args...)}
}

func failed(why diagnosis, format string, args ...any) checkStep {
	return checkStep{Result: checkFailed, Detail: fmt.Sprintf(format, args...), Cause: why.cause, Try: why.try}
}

func (s checkStep) with(values map[string]any) checkStep {
	s.Values = values
	return s
}

// diagnosis is the likely cause of a failure and the commands to run.
type diagnosis struct {
	cause string
	try   []string
}

func likely(cause string, try ...string) diagnosis { return diagnosis{cause, try} }

// text is the step for a terminal of 100 columns.
func (s checkStep) text() string {
	const indent, width = 26, 100
	mark, took := "–", ""
	switch s.Result {
	case checkPassed:
		mark = "✓"
	case checkFailed:
		mark = "✗"
	}
	if s.Result != checkSkipped {
		took = fmt.Sprintf("%.0f ms", s.Millis)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %-13s %8s  ", mark, s.Name, took)
	paragraphs := append([]string{s.Detail}, s.Lines...)
	if s.Cause != "" {
		paragraphs = append(paragraphs, "likely: "+s.Cause)
	}
	for _, command := range s.Try {
		paragraphs = append(paragraphs, "try: "+command)
	}
	for i, p := range paragraphs {
		for j, line := range wrap(p, width-indent) {
			if i+j > 0 {
				b.WriteString(strings.Repeat(" ", indent))
			}
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}

// clean makes text of the other side's harmless to a terminal, and short.
func clean(s string) string {
	const most = 600
	runes := []rune(strings.ToValidUTF8(s, "?"))
	for i, r := range runes {
		if !unicode.IsPrint(r) {
			runes[i] = '?'
		}
	}
	if len(runes) > most {
		runes = append(runes[:most], '…')
	}
	return string(runes)
}

// wrap breaks s into lines of at most width characters, between words where it can.
func wrap(s string, width int) (lines []string) {
	line := []rune(s)
	for len(line) > width {
		cut := width
		for i := width; i > 0; i-- {
			if line[i] == ' ' {
				cut = i
				break
			}
		}
		lines = append(lines, string(line[:cut]))
		line = []rune(strings.TrimLeft(string(line[cut:]), " "))
	}
	return append(lines, string(line))
}

// checkTarget is the relay as the operator named it.
type checkTarget struct {
	given string
	host  string // a DNS name or an IP address without brackets

	// url is the identity endpoint. nil for a multiaddr, which says the rest:
	url  *url.URL
	addr ma.Multiaddr // without /p2p
	id   peer.ID
}

func parseCheckTarget(s string) (t checkTarget, err error) {
	t.given = s
	if strings.HasPrefix(s, "/") {
		addr, err := parseAnnounce(s, checkPort)
		if err != nil {
			return t, err
		}
		if t.addr, t.id = peer.SplitAddr(addr); t.id == "" {
			return t, errors.New("end the address with /p2p/ and the relay's peer ID, as in the banner")
		}
		t.host = t.addr[0].Value()
		return t, nil
	}

	t.url = &url.URL{Scheme: "http", Path: identityPath}
	port := checkHTTPPort
	if strings.Contains(s, "://") {
		u, err := url.Parse(s)
		switch {
		case err != nil:
			return t, errors.New("not a URL")
		case u.Scheme != "http" && u.Scheme != "https":
			return t, fmt.Errorf("a URL begins with http:// or https://, not %s://", clean(u.Scheme))
		case u.User != nil || u.RawQuery != "" || u.Fragment != "":
			return t, errors.New("the identity endpoint has no user, query or fragment")
		}
		t.host, port = u.Hostname(), u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
		}
		t.url.Scheme = u.Scheme
		t.url.Path = strings.TrimSuffix(strings.TrimSuffix(u.Path, "/"), identityPath) + identityPath
	} else if host, p, err := net.SplitHostPort(s); err == nil {
		t.host, port = host, p
	} else {
		t.host = s
		if rest, ok := strings.CutPrefix(s, "["); ok {
			if t.host, ok = strings.CutSuffix(rest, "]"); !ok {
				return t, errors.New("the bracket is not closed")
			}
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return t, fmt.Errorf("port %q is not between 1 and 65535", clean(port))
	}
	// What can be announced can be asked, short of a multiaddr.
	if strings.HasPrefix(t.host, "/") {
		return t, errors.New("not a host name or IP address")
	}
	if _, err := parseAnnounce(t.host, checkPort); err != nil {
		return t, err
	}
	t.url.Host = net.JoinHostPort(t.host, port)
	return t, nil
}
