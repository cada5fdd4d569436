package main

// privstack-relay check: the operator's test of a running relay, from anywhere.
// It does over the network what two clients do, step by step, and says of each
// step that fails what is likely wrong and what to run. Whatever the other side
// does, each step has a deadline and the whole has one.
//
// It leaves behind one record that expires, and no file. It dials the host that
// was asked for and what its identity endpoint announces, maxCheckDials
// addresses at most. The steps are in check_*.go, the clients that they
// play in check_client.go.

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
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

	t.url = &url.URL{Scheme: "http", Path: identityRoute}
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
		t.url.Path = strings.TrimSuffix(strings.TrimSuffix(u.Path, "/"), identityRoute) + identityRoute
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

// checker carries what one step learns to the next.
type checker struct {
	target checkTarget
	a, b   *checkHost

	// blocked is why the steps that follow make no sense. Empty: they do.
	blocked string

	ips     map[family][]netip.Addr // the host's, at most maxCheckIPs each
	noRoute map[family]error        // why this machine can't send to them

	id        peer.ID // the relay's: promised, or else found
	endpoints map[family]endpointAnswer
	listed    []string // by the endpoint that answered; nil if none did
	dials     []dialled
	used      *probe // the address over which the rest is checked

	reservation *circuitclient.Reservation
}

// checkRelay takes all the steps and hands each to report as it ends. The error
// is one of this machine's; what is wrong with the relay is in the steps.
func checkRelay(ctx context.Context, target checkTarget, report func(checkStep)) (r checkReport, err error) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	c := &checker{target: target, id: target.id, ips: make(map[family][]netip.Addr), noRoute: make(map[family]error)}
	for _, h := range []**checkHost{&c.a, &c.b} {
		if *h, err = newCheckHost(); err != nil {
			return r, fmt.Errorf("start a client: %w", err)
		}
		defer (*h).Close()
	}

	r = checkReport{Target: target.given, OK: true, Version: buildVersion()}
	for _, step := range []struct {
		name string
		most time.Duration
		take func(context.Context) checkStep
	}{
		{"name", checkAskTime, c.resolve},
		{"identity-ipv4", checkDialTime, func(ctx context.Context) checkStep { return c.identity(ctx, ipv4) }},
		{"identity-ipv6", checkDialTime, func(ctx context.Context) checkStep { return c.identity(ctx, ipv6) }},
		{"quic-ipv4", checkAskTime + checkDialTime, func(ctx context.Context) checkStep { return c.quic(ctx, ipv4) }},
		{"quic-ipv6", checkAskTime + checkDialTime, func(ctx context.Context) checkStep { return c.quic(ctx, ipv6) }},
		{"addresses", checkAskTime, c.addresses},
		{"identify", checkAskTime, c.identify},
		{"observed", checkAskTime, c.observed},
		{"clients", checkDialTime, c.clients},
		{"dht", checkAskTime, c.dht},
		{"record", checkAskTime, c.record},
		{"reservation", checkAskTime, c.reserve},
		{"circuit", checkCircuitTime, c.circuit},
	} {
		var s checkStep
		switch begun := time.Now(); {
		case ctx.Err() != nil:
			s = failed(diagnosis{}, "not reached: %v", ctx.Err())
		case c.blocked != "":
			s = skipped("%s", c.blocked)
		default:
			stepCtx, cancel := context.WithTimeout(ctx, step.most)
			s = step.take(stepCtx)
			cancel()
			if s.Millis == 0 && s.Result != checkSkipped {
				s.Millis = millis(time.Since(begun))
			}
		}
		s.Name, s.Detail = step.name, clean(s.Detail)
		for i, line := range s.Lines {
			s.Lines[i] = clean(line)
		}
		if s.Result == checkFailed {
			r.OK = false
		}
		r.Steps = append(r.Steps, s)
		report(s)
	}
	if c.id != "" {
		r.PeerID = c.id.String()
	}
	r.Millis = millis(time.Since(begun))
	return r, nil
}
