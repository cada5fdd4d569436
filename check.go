package main

// privstack-relay check: the operator's test of a running relay, from anywhere. It does
// what two clients do, step by step. For each step that fails, it says what is likely
// wrong and what to run. It ends in time, whatever the other side does.
//
// It dials the host that the operator names, and the addresses that this host's identity
// endpoint lists. It leaves one record at the relay, which expires, and writes no file.

import (
	"cmp"
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

	"github.com/libp2p/go-libp2p/core/peer"
)

const (
	checkTimeout  = 28 * time.Second // for all steps, so that closing ends within checkUsage's half a minute
	checkHTTPPort = "4002"           // the identity endpoint's, if the operator gives none
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

// runCheck is the whole subcommand. args are the words after its name. It returns nil if
// no step failed, and a usageError for a mistyped command line.
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
		return usageError{"check: " + flagMistake(err)}
	case fs.NArg() != 1:
		return usageError{"check needs one relay: a host name, an address or a URL"}
	}
	target, err := parseCheckTarget(fs.Arg(0))
	if err != nil {
		return usageError{fmt.Sprintf("check %q: %v", clean(fs.Arg(0)), err)}
	}
	// The steps say what goes wrong; the libraries would say it again.
	joinLibraryLogs(slog.DiscardHandler, false)

	text := stdout
	if *asJSON {
		text = io.Discard
	}
	fmt.Fprintf(text, "Checking %s\n\n", clean(target.given))
	report := checkRelay(ctx, target, func(s checkStep) { io.WriteString(text, s.text()) })
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(report)
	} else if report.OK {
		_, err = fmt.Fprintln(stdout, "\nAll is well.")
	}
	if !report.OK {
		return fmt.Errorf("check: %d of %d steps failed", report.failed, len(report.Steps))
	}
	return err
}

// checkRelay takes all the steps, and calls tell with each when it has ended.
func checkRelay(ctx context.Context, target checkTarget, tell func(checkStep)) checkReport {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	report := checkReport{Target: clean(target.given), Version: buildVersion()}
	// Each phase reads what the one before it has found.
	endpoint := &endpointCheck{checkTarget: target}
	dials := &dialCheck{endpoint: endpoint}
	meet := &meetCheck{dials: dials}
	defer meet.close()
	blocked := "" // why no further step makes sense; "": it does
	for _, step := range []struct {
		name string
		time time.Duration // at most
		take func(context.Context) checkStep
	}{
		{"name", checkAskTime, endpoint.resolve},
		{"identity-ipv4", checkDialTime, func(ctx context.Context) checkStep { endpoint.ask(ctx); return endpoint.over(ipv4) }},
		{"identity-ipv6", checkDialTime, func(context.Context) checkStep { return endpoint.over(ipv6) }},
		{"quic-ipv4", checkAskTime + checkDialTime, func(ctx context.Context) checkStep { dials.dial(ctx); return dials.over(ipv4) }},
		{"quic-ipv6", checkDialTime, func(context.Context) checkStep { return dials.over(ipv6) }},
		{"addresses", checkAskTime, dials.addresses},
		{"identify", checkAskTime, meet.identify},
		{"observed", checkAskTime, meet.observed},
		{"clients", checkDialTime, meet.clients},
		{"dht", checkAskTime, meet.dht},
		{"record", checkAskTime, meet.record},
		{"bridge", checkEchoTime, meet.bridge}, // before "reservation": the relay leaves those who can have a circuit to punch holes
		{"reservation", checkAskTime, meet.reserve},
		{"circuit", checkEchoTime, meet.circuit},
	} {
		begun, s := time.Now(), stepSkipped("%s", blocked)
		if blocked == "" && ctx.Err() == nil {
			ctx, cancel := context.WithTimeout(ctx, step.time)
			s = step.take(ctx)
			cancel()
		}
		if ctx.Err() != nil { // a step that was cut short says nothing about the relay
			s = stepFailed(diagnosis{}, "not reached: the check ran out of time or was interrupted")
		}
		if s.Millis == 0 && s.Result != checkSkipped {
			s.Millis = millis(time.Since(begun))
		}
		if s.Result == checkFailed {
			report.failed++
		}
		s.Name, blocked = step.name, cmp.Or(blocked, s.blocks)
		s = s.cleaned()
		report.Steps = append(report.Steps, s)
		tell(s)
	}
	report.PeerID = cmp.Or(dials.relayID, endpoint.relayID, target.id).String()
	report.OK = report.failed == 0
	report.Millis = millis(time.Since(begun))
	return report
}

// parseCheckTarget reads what the operator gave: a bootstrap address, or where
// the identity endpoint is.
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

	isURL := strings.Contains(s, "://")
	ports := map[string]string{"http": "80", "https": "443"}
	if net.ParseIP(s) != nil {
		s = net.JoinHostPort(s, checkHTTPPort) // which puts brackets around IPv6
	}
	if !isURL {
		s, ports["http"] = "http://"+s, checkHTTPPort
	}
	u, err := url.Parse(s)
	if err != nil || ports[u.Scheme] == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && !isURL {
		return t, errors.New("write a host name, an IP address, HOST:PORT, a URL that begins with http:// or https://, or a bootstrap address")
	}
	port := cmp.Or(u.Port(), ports[u.Scheme])
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return t, fmt.Errorf("port %q is not between 1 and 65535", clean(port))
	}
	t.host = u.Hostname()
	// Any name or IP address that a relay can announce can be checked.
	if _, err := parseAnnounce(t.host, checkPort); err != nil {
		return t, err
	}
	path := strings.TrimSuffix(strings.TrimSuffix(u.Path, "/"), identityRoute) + identityRoute
	t.url = &url.URL{Scheme: u.Scheme, Host: net.JoinHostPort(t.host, port), Path: path}
	return t, nil
}
