package main

// What an operator can choose: the flags with their help, and which version this is.

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// defaultVersion is the version of a build that knows no release. The deployed clients
// were written against it.
const defaultVersion = "0.1.0"

const usage = `privstack-relay - find and reach your PrivStack devices through your own server

Usage: privstack-relay [flags]
       privstack-relay check RELAY   test a running relay, from anywhere
                                     (see check --help)
       privstack-relay healthy       ask the relay on this machine whether it is up:
                                     takes the same flags, and exits with 0 or 1

  -p, --port PORT               UDP port for QUIC (default 4001)
      --http-port PORT          TCP port for the identity endpoint (default 4002)
  -i, --identity FILE           private key; made on first start
                                (default relay-identity.key)
      --announce ADDR           address under which clients reach this relay: an IP
                                address, a DNS name or a multiaddr; repeatable
                                (default: the addresses of this machine)
      --bootstrap MULTIADDR     another relay to join, with its /p2p ID, and through it
                                all that it knows; repeatable
      --circuit-duration TIME   longest life of a connection that the relay carries
                                between two devices, such as 30m; 0 = unlimited
                                (default 1h)
      --circuit-bytes SIZE      most bytes that it carries each way for one such
                                connection, such as 512MiB; 0 = unlimited
                                (default 1GiB)
      --max-bandwidth SIZE      most bytes per second that the relay carries for
                                all, such as 5MiB; 0 = unlimited (default 0)
      --max-clients N           most clients at once; 0 = what memory allows
                                (default 0)
      --max-clients-per-ip N    most clients from one IPv4 address or IPv6 /56
                                (default 256)
      --metrics ADDR            serve metrics for Prometheus at http://ADDR/metrics, such
                                as 127.0.0.1:4003 (default: off)
  -v, --verbose                 log every peer and every step
      --version                 print the version
  -h, --help                    print this help
`

// config is what an operator can choose, checked by parseFlags and then left alone.
type config struct {
	// port is the UDP port for QUIC on all interfaces. 0 takes any free
	// port, which is how the tests run side by side.
	port int

	// httpPort is the TCP port of the HTTP endpoint on all interfaces. 0
	// takes any free port.
	httpPort int

	// keyFile is the file that holds the private key. If there is none, one is
	// created there, readable by its owner only.
	keyFile string

	// announce are the addresses that clients can reach, as the operator
	// wrote them; parseAnnounce accepts each. Empty: the machine's own.
	announce []string

	// bootstrap are the addresses of other relays, as the operator wrote them;
	// parseBootstrap accepts each. Empty: this relay is alone.
	bootstrap []string

	// circuitDuration and circuitBytes (each way) cap one circuit, or one flow
	// of a bridge. 0 is unlimited.
	circuitDuration time.Duration
	circuitBytes    int64

	// maxBandwidth caps what all circuits and bridges carry together, both ways, in bytes
	// per second. 0 is unlimited.
	maxBandwidth int64

	// maxClients is the most clients connected at once. 0 derives it from
	// the memory that the process may use.
	maxClients int

	// maxClientsPerIP is the most clients, at least 1, connected from one
	// IPv4 address or IPv6 /56.
	maxClientsPerIP int

	// metrics is the host and TCP port of the metrics listener; port 0 takes any free
	// port. Empty: there is no listener.
	metrics string

	// verbose logs every peer and libp2p's own debug lines.
	verbose bool

	// testOnlyPlainSockets reads and sends one datagram at a time, as on systems
	// other than Linux.
	testOnlyPlainSockets bool

	// testOnlyResolver looks up names. nil: the machine's own.
	testOnlyResolver *net.Resolver
}

// resolver returns what looks up names.
func (c config) resolver() *net.Resolver {
	if c.testOnlyResolver != nil {
		return c.testOnlyResolver
	}
	return net.DefaultResolver
}

// usageError is a mistake on the command line. The exit status is 2.
type usageError struct{ msg string }

func (e usageError) Error() string { return e.msg }

// errHelp and errVersion are requests, not failures. run answers them on stdout.
var (
	errHelp    = flag.ErrHelp
	errVersion = errors.New("version requested")
)

// parseFlags reads the command line. Its error is a usageError, errHelp or
// errVersion.
func parseFlags(args []string) (config, error) {
	cfg := config{circuitDuration: time.Hour, circuitBytes: 1 << 30}
	fs := flag.NewFlagSet("privstack-relay", flag.ContinueOnError)
	fs.SetOutput(io.Discard) // run and main say what went wrong, once
	number := func(name string, n *int, otherwise int) {
		*n = otherwise
		fs.Func(name, "", func(s string) error {
			value, err := strconv.ParseInt(s, 10, strconv.IntSize)
			if err != nil && !errors.Is(err, strconv.ErrRange) { // of which the checks below tell
				return errors.New("not a number")
			}
			*n = int(value)
			return nil
		})
	}
	size := func(name string, n *int64, example string) {
		fs.Func(name, "", func(s string) (err error) {
			if *n, err = parseSize(s); err != nil {
				return fmt.Errorf("%w; write %s, or 0 for unlimited", err, example)
			}
			return nil
		})
	}
	number("port", &cfg.port, 4001)
	number("p", &cfg.port, 4001)
	number("http-port", &cfg.httpPort, 4002)
	for _, name := range []string{"identity", "i"} {
		fs.StringVar(&cfg.keyFile, name, "relay-identity.key", "")
	}
	fs.Func("announce", "", func(s string) error {
		if _, err := parseAnnounce(s, 1); err != nil {
			return err
		}
		cfg.announce = append(cfg.announce, s)
		return nil
	})
	fs.Func("bootstrap", "", func(s string) error {
		if _, err := parseBootstrap(s); err != nil {
			return err
		}
		cfg.bootstrap = append(cfg.bootstrap, s)
		return nil
	})
	fs.Func("circuit-duration", "", func(s string) (err error) {
		cfg.circuitDuration, err = parseTime(s)
		return err
	})
	size("circuit-bytes", &cfg.circuitBytes, "512MiB or 1GiB")
	size("max-bandwidth", &cfg.maxBandwidth, "bytes per second, such as 5MiB")
	number("max-clients", &cfg.maxClients, 0)
	number("max-clients-per-ip", &cfg.maxClientsPerIP, 256)
	fs.Func("metrics", "", func(s string) error {
		_, port, err := net.SplitHostPort(s)
		if _, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil {
			return errors.New("write a host and a port, such as 127.0.0.1:4003")
		}
		cfg.metrics = s
		return nil
	})
	for _, name := range []string{"verbose", "v"} {
		fs.BoolVar(&cfg.verbose, name, false, "")
	}
	showVersion := fs.Bool("version", false, "")

	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return config{}, errHelp
	case err != nil:
		return config{}, usageError{flagMistake(err)}
	case *showVersion:
		return config{}, errVersion
	case fs.NArg() > 0:
		return config{}, usageError{strayArgument(fs.Arg(0))}
	}

	for _, port := range []struct {
		flag  string
		value int
	}{{"--port", cfg.port}, {"--http-port", cfg.httpPort}} {
		if port.value < 0 || port.value > 65535 {
			return config{}, usageError{fmt.Sprintf("%s %d is not between 0 and 65535", port.flag, port.value)}
		}
	}
	switch {
	case cfg.keyFile == "":
		return config{}, usageError{"--identity needs a file name"}
	case len(cfg.announce) > maxAnnounce:
		return config{}, usageError{fmt.Sprintf("--announce given %d times, at most %d fit into a reservation", len(cfg.announce), maxAnnounce)}
	case len(cfg.bootstrap) > maxRelays:
		return config{}, usageError{fmt.Sprintf("--bootstrap given %d times, at most %d other relays are known", len(cfg.bootstrap), maxRelays)}
	case cfg.circuitDuration < 0:
		return config{}, usageError{fmt.Sprintf("--circuit-duration %v is negative", cfg.circuitDuration)}
	case cfg.circuitDuration > 0 && cfg.circuitDuration < time.Second:
		// Peers are told whole seconds, in which this would be 0: unlimited.
		return config{}, usageError{fmt.Sprintf("--circuit-duration %v is under one second", cfg.circuitDuration)}
	case cfg.circuitDuration > maxCircuitDuration:
		return config{}, usageError{fmt.Sprintf("--circuit-duration %v is above %v, use 0 for unlimited", cfg.circuitDuration, maxCircuitDuration)}
	case cfg.maxBandwidth > 0 && cfg.maxBandwidth < minBandwidth:
		return config{}, usageError{fmt.Sprintf("--max-bandwidth %d is under %d bytes per second, use 0 for unlimited", cfg.maxBandwidth, minBandwidth)}
	case cfg.maxClients < 0 || cfg.maxClients > maxMaxClients:
		return config{}, usageError{fmt.Sprintf("--max-clients %d is not between 0 and %d", cfg.maxClients, maxMaxClients)}
	case cfg.maxClientsPerIP < 1:
		return config{}, usageError{fmt.Sprintf("--max-clients-per-ip %d is below 1", cfg.maxClientsPerIP)}
	}
	if _, port, _ := net.SplitHostPort(cfg.metrics); port != "" && port != "0" && port == strconv.Itoa(cfg.httpPort) {
		return config{}, usageError{"--metrics and --http-port both want TCP port " + port}
	}
	return cfg, nil
}

// strayArgument says what to do about a word that belongs to no flag.
func strayArgument(word string) string {
	says := fmt.Sprintf("unexpected argument %q", word)
	switch {
	case word == "check" || word == "healthy":
		says += fmt.Sprintf("; write it first: privstack-relay %s", word)
	case strings.HasPrefix(word, "–") || strings.HasPrefix(word, "—"):
		// What some programs and pages make of two hyphens.
		says += "; flags begin with two hyphens: --" + strings.TrimLeft(word, "–—-")
	}
	return says
}

// badValue, noValue and unknownFlag match what package flag says of a mistake. It names
// each flag with one dash and explains nothing.
var (
	badValue    = regexp.MustCompile(`^invalid (?:boolean )?value ("(?:[^"\\]|\\.)*") for (?:flag )?-([a-z-]+): (.*)$`)
	noValue     = regexp.MustCompile(`^flag needs an argument: -+([a-z-]+)$`)
	unknownFlag = regexp.MustCompile(`^flag provided but not defined: -+(.*)$`)
)

// flagMistake returns what package flag says in err, in the words of --help.
func flagMistake(err error) string {
	dashes := func(name string) string { return strings.Repeat("-", 1+min(len(name)-1, 1)) + name }
	text := err.Error()
	if m := badValue.FindStringSubmatch(text); m != nil {
		why := m[3]
		if why == "parse error" { // only switches are still read by package flag
			why = "a switch takes no value"
		}
		return fmt.Sprintf("%s %s: %s", dashes(m[2]), m[1], why)
	}
	if m := noValue.FindStringSubmatch(text); m != nil {
		return dashes(m[1]) + " needs a value"
	}
	if m := unknownFlag.FindStringSubmatch(text); m != nil && m[1] != "" {
		says := "there is no flag " + dashes(m[1])
		if port, found := strings.CutPrefix(m[1], "p"); found && port != "" && strings.Trim(port, "0123456789") == "" {
			says = "there is no flag -" + m[1] + "; write -p " + port // which many programs take
		}
		return says
	}
	return text
}

// parseTime reads a length of time: 30m, 1h30m, 1d or 0.
func parseTime(s string) (time.Duration, error) {
	if n, ok := strings.CutSuffix(s, "d"); ok {
		if days, err := strconv.ParseUint(n, 10, 16); err == nil {
			return time.Duration(days) * 24 * time.Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, errors.New("write a number and a unit, such as 30m or 24h, or 0 for unlimited")
	}
	return d, nil
}

// parseSize reads a number of bytes: 1048576, 512KiB, 1.5GiB, 512M (the same as 512MiB),
// or 10MB (a power of ten), in upper or lower case.
func parseSize(s string) (int64, error) {
	number, factor := strings.ToLower(strings.TrimSpace(s)), 1.0
	for i, unit := range []string{"k", "m", "g", "t"} {
		n, binary := strings.CutSuffix(number, unit+"ib")
		if !binary {
			n, binary = strings.CutSuffix(number, unit)
		}
		if binary {
			number, factor = n, math.Pow(1024, float64(i+1))
			break
		}
		if n, ok := strings.CutSuffix(number, unit+"b"); ok {
			number, factor = n, math.Pow(1000, float64(i+1))
			break
		}
	}
	number = strings.TrimSuffix(number, "b")
	n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if err != nil || math.IsNaN(n) {
		return 0, errors.New("not a size")
	}
	n *= factor
	if n > 0 && n < 1 { // as an integer it would be 0, which means unlimited
		return 0, errors.New("less than a byte")
	}
	if n < 0 || n >= 1<<62 {
		return 0, errors.New("not between 0 and 4EiB")
	}
	return int64(n), nil
}

// pseudoVersion matches the version that the Go toolchain gives a commit that is no
// release. https://go.dev/ref/mod#pseudo-versions
var pseudoVersion = regexp.MustCompile(`\d{14}-[0-9a-f]{12}`)

// buildVersion returns the version of this build without a leading v. The Go toolchain
// stamps it: the tag of a release, of a clean clone at that tag and of `go install
// …@v1.2.3`, or a pseudo-version for any other commit. Without a stamp it is
// defaultVersion.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && strings.HasPrefix(info.Main.Version, "v") {
		return info.Main.Version[1:]
	}
	return defaultVersion
}

// agentVersion returns what peers and the identity endpoint are told: the release, or
// defaultVersion for a build that is none.
func agentVersion() string {
	v := buildVersion()
	if pseudoVersion.MatchString(v) || strings.Contains(v, "+") {
		v = defaultVersion
	}
	return "privstack-relay/" + v
}
