package main

// The libraries' logs, joined to ours: go-libp2p logs through slog, kad-dht
// through zap (go-log), quic-go through the standard log package.

import (
	"context"
	"log/slog"
	"os"
	"slices"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
	"go.uber.org/zap/zapcore"
)

// quicWarningEnv keeps quic-go from warning of small UDP buffers: served.log does,
// and says what to run. https://github.com/quic-go/quic-go/wiki/UDP-Buffer-Sizes
const quicWarningEnv = "QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING"

// joinLibraryLogs sends the libraries' lines to h: all of them if verbose, else
// warnings and errors that are not about one peer. It changes process-wide
// state and works only before the first libp2p host, whose loggers keep the
// first handler that they find.
func joinLibraryLogs(h slog.Handler, verbose bool) {
	gologshim.SetDefaultHandler(&libraryHandler{Handler: h, verbose: verbose})
	if _, set := os.LookupEnv(quicWarningEnv); !set {
		os.Setenv(quicWarningEnv, "true")
	}
	slog.SetDefault(slog.New(h)) // takes over the log package too
	golog.SetPrimaryCore(zapToSlog{h})
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

// WithAttrs learns from gologshim's first call whose lines these are.
func (h *libraryHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	muted := h.muted || slices.ContainsFunc(attrs, func(a slog.Attr) bool {
		// identify warns of each peer that hangs up early or sends nonsense,
		// the QUIC transport of each connection that it drops: anybody could
		// fill the disk with such lines, and they name the peer.
		return a.Key == "logger" && (a.Value.String() == "net/identify" || a.Value.String() == "quic-transport")
	})
	return &libraryHandler{h.Handler.WithAttrs(attrs), h.verbose, muted}
}

func (h *libraryHandler) WithGroup(name string) slog.Handler {
	return &libraryHandler{h.Handler.WithGroup(name), h.verbose, h.muted}
}

// zapToSlog is a zapcore.Core that writes to a slog.Handler. Levels are set in
// go-log, per logger.
type zapToSlog struct{ h slog.Handler }

func (c zapToSlog) Enabled(level zapcore.Level) bool {
	return c.h.Enabled(context.Background(), slogLevel(level))
}

func (c zapToSlog) With(fields []zapcore.Field) zapcore.Core {
	return zapToSlog{c.h.WithAttrs(slogAttrs(fields))}
}

func (c zapToSlog) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(e.Level) {
		return ce
	}
	return ce.AddCore(e, c)
}

func (c zapToSlog) Write(e zapcore.Entry, fields []zapcore.Field) error {
	r := slog.NewRecord(e.Time, slogLevel(e.Level), e.Message, 0)
	r.AddAttrs(slog.String("logger", e.LoggerName))
	r.AddAttrs(slogAttrs(fields)...)
	return c.h.Handle(context.Background(), r)
}

func (zapToSlog) Sync() error { return nil }

// slogLevel maps zap's levels (debug -1, info 0, warn 1, error 2 and worse) to
// slog's, which are four apart.
func slogLevel(level zapcore.Level) slog.Level {
	return min(slog.Level(4*level), slog.LevelError)
}

func slogAttrs(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	attrs := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
		attrs = append(attrs, slog.Any(f.Key, enc.Fields[f.Key]))
	}
	return attrs
}
