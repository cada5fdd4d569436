package main

// The libraries' logs, joined to ours: go-libp2p logs through slog, kad-dht through
// zap (go-log), quic-go through the standard log package.

import (
	"context"
	"log/slog"
	"os"
	"slices"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

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

// libraryHandler keeps go-libp2p's lines about single peers out of a quiet log.
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
		// the disk with such lines, and they name the peer.
		return a.Key == "logger" && (a.Value.String() == "net/identify" || a.Value.String() == "quic-transport")
	})
	return &libraryHandler{h.Handler.WithAttrs(attrs), h.verbose, muted}
}

func (h *libraryHandler) WithGroup(name string) slog.Handler {
	return &libraryHandler{h.Handler.WithGroup(name), h.verbose, h.muted}
}

// zapCore writes zap's lines to h, as one message each: errors and worse as errors,
// all others as debug lines. go-log sets which are written.
func zapCore(h slog.Handler) zapcore.Core {
	lines := func(level slog.Level, of zap.LevelEnablerFunc) zapcore.Core {
		format := zapcore.EncoderConfig{NameKey: "logger", MessageKey: "msg", ConsoleSeparator: " "}
		return zapcore.NewCore(zapcore.NewConsoleEncoder(format), zapcore.AddSync(slog.NewLogLogger(h, level).Writer()), of)
	}
	return zapcore.NewTee(
		lines(slog.LevelError, func(l zapcore.Level) bool { return l >= zapcore.ErrorLevel }),
		lines(slog.LevelDebug, func(l zapcore.Level) bool { return l < zapcore.ErrorLevel }))
}
