package main

// How log lines look, and the libraries' logs, joined to ours: go-libp2p logs through
// slog, kad-dht through zap (go-log), quic-go through the standard log package.

import (
	"context"
	"io"
	"log/slog"
	"os"
	"slices"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// journalEnv is set by systemd to the device and inode of the stream that leads to the
// journal. https://www.freedesktop.org/software/systemd/man/systemd.exec.html
const journalEnv = "JOURNAL_STREAM"

// newLogHandler returns a handler that writes lines of level and above to w. If w leads to
// the journal, lines have no time, which the journal adds, and begin with their priority,
// so that journalctl -p warning finds the warnings.
func newLogHandler(w io.Writer, level slog.Level, journal bool) slog.Handler {
	options := &slog.HandlerOptions{Level: level}
	if !journal {
		return slog.NewTextHandler(w, options)
	}
	options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey && a.Value.Kind() == slog.KindTime {
			return slog.Attr{}
		}
		return a
	}
	h := journalHandler{}
	for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
		priority := priorityOf(level)
		h[priority] = slog.NewTextHandler(prefixed{w, priority}, options)
	}
	return h
}

// tellLost returns a function that writes to a log that some of its lines were dropped.
func tellLost(journal bool) func(w io.Writer, lost int64) {
	return func(w io.Writer, lost int64) {
		slog.New(newLogHandler(w, slog.LevelWarn, journal)).Warn("log lines dropped because they were not read fast enough", "lines", lost)
	}
}

// priorityOf returns how a line of that level begins in the journal: with syslog's
// priority in angle brackets.
// https://www.freedesktop.org/software/systemd/man/sd-daemon.html
func priorityOf(level slog.Level) string {
	switch {
	case level < slog.LevelInfo:
		return "<7>"
	case level < slog.LevelWarn:
		return "<6>"
	case level < slog.LevelError:
		return "<4>"
	}
	return "<3>"
}

// prefixed writes prefix before each text. A slog handler writes one line at a time.
type prefixed struct {
	w      io.Writer
	prefix string
}

func (p prefixed) Write(text []byte) (int, error) {
	_, err := p.w.Write(append([]byte(p.prefix), text...))
	return len(text), err
}

// journalHandler has one handler for each priority.
type journalHandler map[string]slog.Handler

func (h journalHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h[priorityOf(level)].Enabled(ctx, level)
}

func (h journalHandler) Handle(ctx context.Context, r slog.Record) error {
	return h[priorityOf(r.Level)].Handle(ctx, r)
}

func (h journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.each(func(one slog.Handler) slog.Handler { return one.WithAttrs(attrs) })
}

func (h journalHandler) WithGroup(name string) slog.Handler {
	return h.each(func(one slog.Handler) slog.Handler { return one.WithGroup(name) })
}

func (h journalHandler) each(change func(slog.Handler) slog.Handler) slog.Handler {
	changed := journalHandler{}
	for priority, one := range h {
		changed[priority] = change(one)
	}
	return changed
}

// quicWarningEnv keeps quic-go from warning about small UDP buffers. We do that, and
// say what to run. https://github.com/quic-go/quic-go/wiki/UDP-Buffer-Sizes
const quicWarningEnv = "QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING"

// joinLibraryLogs sends the libraries' lines to h: all of them if verbose, else
// warnings and errors that are not about one peer. It changes the state of the whole
// process, and works only before the first libp2p host: its loggers keep the first
// handler that they find.
func joinLibraryLogs(h slog.Handler, verbose bool) {
	gologshim.SetDefaultHandler(&libraryHandler{Handler: h, verbose: verbose})
	if _, set := os.LookupEnv(quicWarningEnv); !set {
		os.Setenv(quicWarningEnv, "true")
	}
	slog.SetDefault(slog.New(h)) // takes over the log package too
	golog.SetPrimaryCore(zapCore(h))
	level := golog.LevelError
	if verbose {
		level = golog.LevelDebug
	}
	golog.SetAllLoggers(level)
}

// libraryHandler keeps go-libp2p's lines about single peers out of the log, unless it is
// verbose.
type libraryHandler struct {
	slog.Handler
	verbose bool
	muted   bool // this logger's warnings are about one connection each
}

func (h *libraryHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.Handler.Enabled(ctx, level) && (h.verbose || level >= slog.LevelWarn && !h.muted)
}

// WithAttrs learns whose lines these are: gologshim calls it first with the logger's
// name.
func (h *libraryHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	muted := h.muted || slices.ContainsFunc(attrs, func(a slog.Attr) bool {
		// identify warns about each peer that hangs up early or sends nonsense, the
		// QUIC transport about each connection that it drops. Anybody could fill
		// the disk with such lines, and they name the peer. The swarm warns at each
		// dial of a name that does not resolve, and names.go has warned of it already.
		return a.Key == "logger" && slices.Contains([]string{"net/identify", "quic-transport", "swarm2"}, a.Value.String())
	})
	return &libraryHandler{h.Handler.WithAttrs(attrs), h.verbose, muted}
}

func (h *libraryHandler) WithGroup(name string) slog.Handler {
	return &libraryHandler{h.Handler.WithGroup(name), h.verbose, h.muted}
}

// zapCore writes each of zap's lines to h as one message: errors and worse as errors, all
// others at debug. go-log's levels decide which lines get here.
func zapCore(h slog.Handler) zapcore.Core {
	lines := func(level slog.Level, of zap.LevelEnablerFunc) zapcore.Core {
		format := zapcore.EncoderConfig{NameKey: "logger", MessageKey: "msg", ConsoleSeparator: " "}
		return zapcore.NewCore(zapcore.NewConsoleEncoder(format), zapcore.AddSync(slog.NewLogLogger(h, level).Writer()), of)
	}
	return zapcore.NewTee(
		lines(slog.LevelError, func(l zapcore.Level) bool { return l >= zapcore.ErrorLevel }),
		lines(slog.LevelDebug, func(l zapcore.Level) bool { return l < zapcore.ErrorLevel }))
}
