//go:build unix

package main

// SIGUSR1, and what the summary in the log says.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
)

// An operator asks a running relay how it is doing.
func TestProcessSumsUpOnSIGUSR1(t *testing.T) {
	p := start(t)
	c := newClient(t)
	if err := c.Connect(testContext(t), p.bootstrap); err != nil {
		t.Fatal(err)
	}
	req := kadpb.NewMessage(kadpb.Message_PUT_VALUE, []byte("/elsewhere/x"), 0)
	if _, err := tryAsk(testContext(t), c, testRelay{info: p.bootstrap}, req); err == nil {
		t.Fatal("a record outside /privstack/ was accepted")
	}
	p.Process.Signal(syscall.SIGUSR1)
	eventually(t, "a summary is logged", func() bool { return p.stderr.line("summary") != "" })
	line := p.stderr.line("summary")
	for _, want := range []string{"uptime=", "memory_bytes=", "peers_served=1 ", "relayed_connections=0 ", "clients=1 ", "reservations=0 ",
		"circuits=0 ", "relayed_bytes=0 ", "records=0 ", "refused.record=1"} {
		if !strings.Contains(line, want) {
			t.Errorf("summary %q lacks %q", line, want)
		}
	}
	if strings.Contains(line, "12D3KooW") || strings.Contains(line, "127.0.0.1") {
		t.Errorf("summary %q names somebody", line)
	}
	p.Process.Signal(syscall.SIGTERM)
	if code := p.wait(t); code != 0 {
		t.Errorf("exit status %d after a summary, want 0", code)
	}
}

// An operator who asks too early, while the relay still waits for DNS, does not end it,
// and gets the summary when it has started.
func TestSIGUSR1DuringTheStart(t *testing.T) {
	unharmed := make(chan os.Signal, 1)
	notifySummary(unharmed) // or the signal could end the tests
	defer signal.Stop(unharmed)
	cfg := defaultConfig(t, "--announce=relay.example.org")
	var once sync.Once
	cfg.testOnlyResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		once.Do(func() {
			syscall.Kill(os.Getpid(), syscall.SIGUSR1)
			<-unharmed
		})
		return nil, errors.New("no DNS in this test")
	}}
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var logged logBuffer
	key, ended := newTestKey(t), make(chan error, 1)
	go func() {
		ended <- serve(ctx, cfg, identity{key: key}, slog.New(slog.NewTextHandler(&logged, nil)), func(node) {})
	}()
	eventually(t, "a summary is logged", func() bool { return logged.line("summary") != "" })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// "permission denied" alone sends an operator to the mode of the file, when it is
// somebody else's.
func TestUnreadableForeignKeyFileIsNamed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give files away")
	}
	const stranger = 54321
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	// Root's, if the relay was tried by hand before it became a service.
	for uid, name := range map[int]string{65534: "nobody (uid 65534)", 0: "root (uid 0)"} {
		cmd := command(t, "--identity="+path)
		err := errors.Join(os.WriteFile(path, oldKeyFile, 0o600), os.Chown(path, uid, -1),
			os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o755), os.Chmod(buildDir, 0o755))
		if err != nil {
			t.Fatal(err)
		}
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: stranger, Gid: stranger}}
		out, err := cmd.CombinedOutput()
		want := "permission denied: the file belongs to " + name + ", this process runs as uid 54321; as root: chown 54321 " + path + "\n"
		if err == nil || !strings.HasSuffix(string(out), want) {
			t.Errorf("output = %q (%v), want %q", out, err, want)
		}
	}
}

// Where too few files may be open, the operator is told to raise that limit, and not that
// the machine lacks IPv4.
func TestTooFewOpenFilesIsNotNoIPv4(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key") // made before the limit bites
	told := false
	for files := 40; files > 4 && !told; files-- {
		cmd := command(t, "--port=0", "--http-port=0", "--identity="+key)
		cmd.Args = append([]string{"sh", "-c", fmt.Sprintf(`ulimit -n %d && exec "$@"`, files), "sh", cmd.Path}, cmd.Args[1:]...)
		cmd.Path, _ = exec.LookPath("sh")
		stderr := new(logBuffer)
		cmd.Stderr = stderr
		startUntilCleanup(t, cmd)
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		eventually(t, "it serves or ends", func() bool {
			select {
			case err := <-ended:
				ended <- err
				return true
			default:
				return stderr.line("relay ready") != ""
			}
		})
		cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		if strings.Contains(stderr.String(), "no IPv4 on this machine") {
			t.Errorf("with %d open files:\n%s", files, stderr)
		}
		told = strings.Contains(stderr.String(), "raise the limit of open files")
	}
	if !told {
		t.Error("no start failed with a word about the limit of open files")
	}
}
