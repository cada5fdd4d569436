//go:build packages

package main

// What the packages do to a machine: a clean Debian that boots in its own namespaces, with
// systemd as PID 1. .ci/packages makes both and runs these tests.

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// packageFile returns the path of the package of that format, made by .ci/goreleaser.
func packageFile(t *testing.T, format string) string {
	t.Helper()
	files, _ := filepath.Glob("dist/*_linux_amd64." + format)
	if len(files) != 1 {
		t.Fatalf("dist holds %d amd64 packages of format %s, want 1: run .ci/packages", len(files), format)
	}
	return files[0]
}

// laterDeb writes the same deb with a later version into dir.
func laterDeb(t *testing.T, dir string) {
	t.Helper()
	tree := t.TempDir()
	sh(t, `dpkg-deb -R "$1" "$2" && sed -i 's/^Version: .*/Version: 99.0.0/' "$2"/DEBIAN/control && dpkg-deb -Znone -b "$2" "$3"`,
		packageFile(t, "deb"), tree, filepath.Join(dir, "later.deb"))
}

// sh runs a shell script with arguments and returns its output.
func sh(t testing.TB, script string, args ...string) string {
	t.Helper()
	out, err := exec.Command("sh", append([]string{"-ec", script, "sh"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// changedRoot makes a root directory below $tmp from the clean Debian in $debian, and enters
// it. What is written there is gone with the mount namespace. The host's directory $mnt is
// at /mnt.
const changedRoot = `
	mount --make-rprivate /
	mount -t tmpfs -o mode=755 tmpfs $tmp
	mkdir $tmp/upper $tmp/work $tmp/root
	mount -t overlay -o lowerdir=$debian,upperdir=$tmp/upper,workdir=$tmp/work overlay $tmp/root
	mount --bind $mnt $tmp/root/mnt
	cd $tmp/root
	mount -t proc proc proc
	mount --bind proc/sys proc/sys
	mount -o remount,bind,ro proc/sys
	mount -t tmpfs -o mode=755 tmpfs dev
	mkdir dev/pts dev/shm
	for n in null zero full random urandom tty; do touch dev/$n; mount --bind /dev/$n dev/$n; done
	mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
	ln -s pts/ptmx dev/ptmx
	ln -s /proc/self/fd dev/fd
	mount -t tmpfs -o mode=755 tmpfs run
	mkdir run/old
	pivot_root . run/old
`

// debian returns the directory with a clean Debian, or skips the test.
func debian(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("PRIVSTACK_DEBIAN")
	if dir == "" || os.Geteuid() != 0 {
		t.Skip("needs root and PRIVSTACK_DEBIAN, the directory of a clean Debian: run .ci/packages")
	}
	return dir
}

// inChroot runs a script on a clean Debian without a running systemd, as in a container
// image, and returns its output. The host's directory mnt is at /mnt.
func inChroot(t *testing.T, mnt, script string) string {
	t.Helper()
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "sh", "-ec", changedRoot+`
		cd /
		umount -l /run/old
		exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -ec "$script"`)
	cmd.Env = append(os.Environ(), "tmp="+t.TempDir(), "debian="+debian(t), "mnt="+mnt, "script="+script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// machine is a booted Debian in a network namespace of the lab.
type machine struct {
	t   testing.TB
	pid int // of its PID 1, as the host sees it
}

// machine boots one in ns. The host's directory mnt is at its /mnt.
func (l *lab) machine(ns, mnt string) *machine {
	l.t.Helper()
	t := l.t
	cgroups := strings.Fields(sh(t, `grep -m1 ' cgroup2 ' /proc/mounts`))[1]
	cgroup := filepath.Join(cgroups, ns)
	t.Cleanup(func() { exec.Command("find", cgroup, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+").Run() })
	cmd := exec.Command("nsenter", "--net=/run/netns/"+ns, "sh", "-ec", `
		mkdir $cgroup
		echo $$ >$cgroup/cgroup.procs
		exec unshare --pid --fork --kill-child --mount --uts --ipc --cgroup sh -ec "$boot"`)
	cmd.Env = append(os.Environ(), "cgroup="+cgroup, "tmp="+t.TempDir(), "debian="+debian(t), "mnt="+mnt, "boot="+changedRoot+`
		mount -t sysfs -o ro sysfs sys
		mount -t cgroup2 cgroup2 sys/fs/cgroup
		echo machine >etc/hostname
		echo uninitialized >etc/machine-id
		# No units for hardware, consoles, the kernel, which is the host's, or the network,
		# which the lab has set up.
		for unit in systemd-networkd.service systemd-networkd.socket systemd-networkd-wait-online.service console-getty.service systemd-firstboot.service systemd-modules-load.service systemd-remount-fs.service \
			modprobe@.service sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount apt-daily.timer apt-daily-upgrade.timer; do
			ln -sf /dev/null etc/systemd/system/$unit
		done
		cd /
		umount -l /run/old
		exec setpriv --bounding-set=-sys_module,-sys_time,-sys_rawio,-syslog env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=multi-user.target`)
	var console strings.Builder
	cmd.Stdout, cmd.Stderr = &console, &console
	l.start(cmd)
	m := &machine{t: t}
	t.Cleanup(func() { // when PID 1 ends, all of its processes do, and then unshare
		if m.pid != 0 {
			syscall.Kill(m.pid, syscall.SIGKILL)
			cmd.Wait()
		}
	})
	eventually(t, "systemd is PID 1", func() bool {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		m.pid, _ = strconv.Atoi(strings.TrimSpace(string(children)))
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", m.pid))
		return string(comm) == "systemd\n"
	})
	m.until("systemctl is-system-running", "running")
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := m.try("systemctl --no-pager status; journalctl --no-pager -b | tail -150")
			t.Logf("console:\n%s\n%s", &console, out)
		}
	})
	return m
}

func (m *machine) try(script string) (string, error) {
	out, err := exec.Command("nsenter", "-t", strconv.Itoa(m.pid), "-a", "-r", "-w",
		"env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-ec", script).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// do runs a shell script on the machine and returns its output.
func (m *machine) do(script string) string {
	m.t.Helper()
	out, err := m.try(script)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

// is checks that a command prints want.
func (m *machine) is(script, want string) {
	m.t.Helper()
	if got := m.do(script); got != want {
		m.t.Errorf("%s: %q, want %q", script, got, want)
	}
}

// until waits until a command prints want, longer than any watchdog takes.
func (m *machine) until(script, want string) {
	m.t.Helper()
	deadline := time.After(4 * testTimeout)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		got, _ := m.try(script)
		if got == want {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			m.t.Fatalf("%s: still %q, want %q", script, got, want)
		}
	}
}

// unit returns a property of the relay's unit.
func (m *machine) unit(property string) string {
	m.t.Helper()
	return m.do("systemctl show --value -p " + property + " privstack-relay")
}

// limits returns the line with the limits in the log of the relay's latest start.
func (m *machine) limits() string {
	m.t.Helper()
	return m.do(`journalctl -u privstack-relay -o cat | grep 'msg=limits' | tail -n 1`)
}

// starts returns how often the relay has started on this machine.
func (m *machine) starts() int {
	m.t.Helper()
	n, err := strconv.Atoi(m.do(`journalctl --sync; journalctl -u privstack-relay -o cat | grep -c 'msg="relay ready"' || true`))
	if err != nil {
		m.t.Fatal(err)
	}
	return n
}

// site is a relay's machine and two clients. They reach the machine, but not each other.
type site struct {
	*lab
	*machine
	clients [2]string // namespaces
}

func newSite(t *testing.T, mnt string) site {
	t.Helper()
	debian(t)
	s := site{lab: newLab(t)}
	ns := s.public("relay", "11.0.0.1/24", "2a00::1/64")
	for i := range s.clients {
		s.clients[i] = s.namespace("client")
		port := s.attach(s.clients[i], "wan", s.inet, fmt.Sprintf("11.0.0.%d/24", i+2), fmt.Sprintf("2a00::%d/64", i+2))
		s.in(s.inet, "bridge link set dev "+port+" isolated on")
	}
	s.machine = s.lab.machine(ns, mnt)
	return s
}

// serves checks that clients can reserve, use a circuit and find a record, over IPv4 and
// IPv6. It returns the peer ID that the identity endpoint told them.
func (s site) serves(t *testing.T) (id peer.ID) {
	t.Helper()
	l := &lab{t: t, inet: s.inet} // so that its clients end with t
	for _, net := range []struct{ ip, host string }{{"/ip4/11.0.0.1", "11.0.0.1"}, {"/ip6/2a00::1", "[2a00::1]"}} {
		t.Run(net.ip[1:4], func(t *testing.T) {
			l := &lab{t: t, inet: l.inet}
			scout := l.labClient(s.clients[0])
			id = scout.must(labRequest{Do: "identity", URL: "http://" + net.host + ":4002" + identityRoute}).ID
			relay := peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{ma.StringCast(net.ip + "/udp/4001/quic-v1")}}
			scout.id = scout.must(labRequest{Do: "join", Relay: &relay}).ID
			mate := l.client(s.clients[1], relay)
			if got := mate.must(labRequest{Do: "reserve"}); len(got.Addrs) == 0 {
				t.Error("the reservation has no address")
			}
			info := peer.AddrInfo{ID: mate.id}
			scout.must(labRequest{Do: "circuit", Peer: &info})
			if got := scout.must(labRequest{Do: "sync", Peer: &info, Bytes: 1 << 20}); !got.Circuit {
				t.Error("1 MiB did not go through the relay")
			}
			mate.must(labRequest{Do: "put"})
			if got := scout.must(labRequest{Do: "get"}); got.ID != mate.id {
				t.Errorf("record found is %v's, want %v's", got.ID, mate.id)
			}
		})
	}
	return id
}

// The life of an installation in the sandbox of the packaged unit. Each step is something
// that an operator does or that happens to him, and clients are served as before after it.
func TestPackageLivesOnAMachine(t *testing.T) {
	mnt := t.TempDir()
	sh(t, `cp "$1" "$2"/first.deb`, packageFile(t, "deb"), mnt)
	laterDeb(t, mnt)
	s := newSite(t, mnt)
	var id peer.ID
	step := func(name string, f func(t *testing.T)) {
		if !t.Run(name, f) {
			t.FailNow()
		}
	}
	same := func(t *testing.T) {
		t.Helper()
		if got := s.serves(t); got != id {
			t.Errorf("peer ID is %v, was %v", got, id)
		}
	}

	step("install", func(t *testing.T) {
		out := s.do("dpkg -i /mnt/first.deb 2>&1")
		t.Logf("%s", out)
		for _, next := range []string{"open UDP 4001 and TCP 4002", `ufw allow "PrivStack Relay"`, "journalctl -u privstack-relay", "privstack-relay check"} {
			if !strings.Contains(out, next) {
				t.Errorf("dpkg -i does not say what is left to do: %s", next)
			}
		}
		s.is("systemctl is-active privstack-relay", "active")
		s.is("systemctl is-enabled privstack-relay", "enabled")
		s.is("stat -c '%a %U %G' /var/lib/privstack", "700 privstack privstack")
		s.is("stat -c '%a %U %G' /var/lib/privstack/relay-identity.key", "600 privstack privstack")
		s.is("dpkg -V privstack-relay", "")
		s.do("cd /usr/share/doc/privstack-relay && ls README.md SECURITY.md docs/meeting.md contrib/compose.yaml")
		s.is("systemd-analyze verify --man=no privstack-relay.service 2>&1", "")
		s.do("systemd-analyze security --offline=true --threshold=11 /usr/lib/systemd/system/privstack-relay.service") // in tenths
		s.is("ufw app info 'PrivStack Relay' | tail -n 2 | xargs", "4001/udp 4002/tcp")
		s.is("/lib/systemd/systemd-sysctl --cat-config | grep -c 'net.core.[rw]mem_max = 7500000'", "2")
		id = s.serves(t)
	})
	step("the memory limit fits max_clients", func(t *testing.T) {
		memory, _ := availableMemory(os.DirFS("/"))
		if limit, err := strconv.ParseUint(s.unit("MemoryMax"), 10, 64); err != nil || limit >= memory {
			t.Errorf("MemoryMax = %d, %v, want one below %d", limit, err, memory)
		} else if controllers, _ := s.try("cat /sys/fs/cgroup/cgroup.controllers"); strings.Contains(controllers, "memory") {
			memory = limit
		} else {
			t.Log("the memory controller is not in cgroup v2 here, so MemoryMax has no effect")
		}
		if want := fmt.Sprintf(" max_clients=%d ", clientsFor(memory)); !strings.Contains(s.limits(), want) {
			t.Errorf("start log is %s, want %s", s.limits(), want)
		}
		s.is("cat /proc/"+s.unit("MainPID")+"/limits | grep 'open files' | xargs", "Max open files 4096 4096 files")
	})
	step("restart", func(t *testing.T) {
		s.do("systemctl restart privstack-relay")
		same(t)
	})
	step("forbidden system calls kill", func(t *testing.T) {
		s.do(`mkdir -p /etc/systemd/system/privstack-relay.service.d
			printf '[Service]\nSystemCallErrorNumber=kill\n' >/etc/systemd/system/privstack-relay.service.d/kill.conf
			systemctl daemon-reload
			systemctl restart privstack-relay`)
		same(t)
		s.do("systemctl restart privstack-relay") // so that stopping is tried, too
		if n := s.unit("NRestarts"); n != "0" {
			t.Errorf("%s restarts, want none", n)
		}
		s.is("journalctl -u privstack-relay | grep -c SIGSYS || true", "0")
		s.do("rm -r /etc/systemd/system/privstack-relay.service.d; systemctl daemon-reload; systemctl restart privstack-relay")
	})
	step("hang", func(t *testing.T) {
		before := s.starts()
		s.do("systemctl kill --kill-whom=main --signal=STOP privstack-relay")
		s.until("systemctl show --value -p NRestarts,ActiveState privstack-relay | xargs", "1 active")
		if s.starts() != before+1 {
			t.Fatalf("%d starts, want %d", s.starts(), before+1)
		}
		s.is("journalctl -u privstack-relay | grep -c 'Watchdog timeout'", "1")
		same(t)
	})
	step("fault", func(t *testing.T) {
		before := s.starts()
		s.do("systemctl kill --kill-whom=main --signal=QUIT privstack-relay") // ends a Go program as a panic does
		s.until(`journalctl -u privstack-relay -o cat | grep -c 'msg="relay ready"'`, strconv.Itoa(before+1))
		same(t)
	})
	step("mistyped flag", func(t *testing.T) {
		s.do(`echo 'RELAY_FLAGS="--max-clints 7"' >/etc/default/privstack-relay; systemctl restart privstack-relay || true`)
		s.until("systemctl show --value -p ActiveState,Result,NRestarts privstack-relay | sort | xargs", "0 exit-code failed")
		s.is("journalctl -u privstack-relay -p err -o cat | grep 'privstack-relay: '", "privstack-relay: there is no flag --max-clints")
		s.do(`echo 'RELAY_FLAGS="--circuit-bytes 15MiB"' >/etc/default/privstack-relay; systemctl restart privstack-relay`)
		s.until("journalctl -u privstack-relay -p warning -o cat | grep -c -e '--circuit-bytes is less'", "1")
		s.is("journalctl -u privstack-relay -p warning -o cat | grep -c level=INFO || true", "0")
		s.is("journalctl -u privstack-relay -o cat | grep -c time= || true", "0")
		same(t)
	})
	step("upgrade", func(t *testing.T) {
		s.do(`echo 'RELAY_FLAGS="--max-clients 77 --verbose"' >/etc/default/privstack-relay`)
		before := s.starts()
		t.Logf("%s", s.do("dpkg -i /mnt/later.deb 2>&1"))
		s.is("dpkg-query -W -f '${Version}' privstack-relay", "99.0.0")
		if got := s.starts(); got != before+1 {
			t.Errorf("%d restarts, want one", got-before)
		}
		if !strings.Contains(s.limits(), " max_clients=77 ") {
			t.Errorf("start log is %s, want the operator's max_clients=77", s.limits())
		}
		same(t)
	})
	step("stop", func(t *testing.T) {
		s.do("systemctl stop privstack-relay")
		s.is("systemctl show -p Result,ExecMainStatus,ExecMainCode,ActiveState privstack-relay | sort | xargs", "ActiveState=inactive ExecMainCode=1 ExecMainStatus=0 Result=success")
		s.do("systemctl start privstack-relay")
	})
	step("remove", func(t *testing.T) {
		out := s.do("dpkg -r privstack-relay 2>&1")
		if !strings.Contains(out, "is left in /var/lib/privstack") {
			t.Errorf("dpkg -r says %q, want where the key is", out)
		}
		s.is("systemctl is-active privstack-relay || true", "inactive")
		s.is("ls /var/lib/privstack /etc/default/privstack-relay | xargs", "/etc/default/privstack-relay /var/lib/privstack: relay-identity.key")
		s.do("dpkg -i /mnt/later.deb 2>&1")
		same(t)
	})
	step("purge", func(t *testing.T) {
		out := s.do("dpkg -P privstack-relay 2>&1")
		if !strings.Contains(out, "this peer ID is gone") {
			t.Errorf("dpkg -P says %q, want what is lost", out)
		}
		s.is("ls -d /var/lib/privstack /etc/default/privstack-relay /etc/systemd/system/*/privstack-relay.service /etc/ufw/applications.d/privstack-relay 2>/dev/null || true", "")
	})
}

// byHand installs a relay as the README of the old relay told operators to.
const byHand = `
	useradd --system --home-dir /var/lib/privstack --create-home --shell /usr/sbin/nologin privstack
	dpkg-deb --fsys-tarfile /mnt/first.deb | tar -xO ./usr/bin/privstack-relay >/usr/local/bin/privstack-relay
	chmod 755 /usr/local/bin/privstack-relay
	printf '%s\n' '[Unit]' 'Description=PrivStack Relay' 'After=network.target' \
		'[Service]' 'Type=simple' 'User=privstack' 'WorkingDirectory=/var/lib/privstack' \
		"ExecStart=/usr/local/bin/privstack-relay --identity /var/lib/privstack/relay-identity.key$flags" 'Restart=always' 'RestartSec=5' \
		'[Install]' 'WantedBy=multi-user.target' >/etc/systemd/system/privstack-relay.service
	systemctl daemon-reload
	systemctl enable --now privstack-relay 2>/dev/null
`

// An operator who installed the old relay by hand keeps the peer ID. With another one he
// would lose every client.
func TestPackageTakesOverAnInstallByHand(t *testing.T) {
	mnt := t.TempDir()
	sh(t, `cp "$1" "$2"/first.deb`, packageFile(t, "deb"), mnt)
	for _, tt := range []struct{ name, flags, unit, says string }{
		{"as the README had it", "", "/lib/systemd/system/privstack-relay.service", "the packaged unit replaces"},
		{"with flags of its own", " --max-clients 99", "/etc/systemd/system/privstack-relay.service", "stays in force"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t, mnt)
			s.do("flags='" + tt.flags + "'" + byHand)
			var id, after peer.ID
			t.Run("before", func(t *testing.T) {
				// Type=simple is active before it serves.
				s.until(`journalctl -u privstack-relay -o cat | grep -c 'msg="relay ready"'`, "1")
				s.do("chmod 644 /var/lib/privstack/relay-identity.key")
				id = s.serves(t)
			})
			out := s.do("dpkg -i /mnt/first.deb 2>&1")
			if !strings.Contains(out, tt.says) {
				t.Errorf("dpkg says %q, want %q", out, tt.says)
			}
			t.Run("after", func(t *testing.T) { after = s.serves(t) })
			if id == "" || after != id {
				t.Errorf("peer ID is %v, was %v", after, id)
			}
			if got := strings.TrimPrefix(s.unit("FragmentPath"), "/usr"); got != tt.unit {
				t.Errorf("unit is %s, want %s", got, tt.unit)
			}
			s.is("systemctl is-enabled privstack-relay", "enabled")
			s.is("stat -c '%a %U' /var/lib/privstack /var/lib/privstack/relay-identity.key | xargs", "700 privstack 600 privstack")
			s.do("systemctl restart privstack-relay")
		})
	}
}

// An image is built where systemd does not run. The relay starts with the next boot.
func TestPackageInstallsWithoutSystemdRunning(t *testing.T) {
	mnt := t.TempDir()
	sh(t, `cp "$1" "$2"/first.deb`, packageFile(t, "deb"), mnt)
	out := inChroot(t, mnt, `dpkg -i /mnt/first.deb
		id privstack
		stat -c '%a %U' /var/lib/privstack
		readlink /etc/systemd/system/multi-user.target.wants/privstack-relay.service
		/usr/bin/privstack-relay --help >/tmp/help
		dpkg -P privstack-relay`)
	for _, want := range []string{"(privstack)", "\n700 privstack\n", "lib/systemd/system/privstack-relay.service\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q:\n%s", want, out)
		}
	}
}

// The man page has every flag that --help has.
func TestManPageHasEveryFlag(t *testing.T) {
	mnt := t.TempDir()
	page := sh(t, `dpkg-deb --fsys-tarfile "$1" | tar -xO ./usr/share/man/man8/privstack-relay.8.gz >"$2"/page.8.gz
		zcat "$2"/page.8.gz`, packageFile(t, "deb"), mnt)
	for _, flag := range regexp.MustCompile(`--[a-z-]+`).FindAllString(usage+checkUsage, -1) {
		if !strings.Contains(page, strings.ReplaceAll(flag, "-", `\-`)) {
			t.Errorf("man page lacks %s", flag)
		}
	}
}

// Debian's rpm installs the package and runs its scripts. It has the same files as the deb.
func TestRPMInstallsAndGoes(t *testing.T) {
	mnt := t.TempDir()
	sh(t, `cp "$1" "$2"/relay.rpm`, packageFile(t, "rpm"), mnt)
	out := inChroot(t, mnt, `
		rpm -qp --scripts /mnt/relay.rpm | grep -c 'systemd-sysusers privstack-relay.conf'
		rpm -qpl /mnt/relay.rpm
		rpm -qpc /mnt/relay.rpm | sed 's/^/config /'
		rpm -i --nodeps /mnt/relay.rpm
		stat -c '%a %U' /var/lib/privstack
		/usr/bin/privstack-relay --help >/tmp/help
		rpm -V --nodeps privstack-relay && echo verified
		touch /var/lib/privstack/relay-identity.key
		rpm -e privstack-relay
		ls /var/lib/privstack /usr/bin/privstack-relay 2>&1 || true`)
	for _, want := range []string{
		"\n/usr/lib/systemd/system/privstack-relay.service\n", "\nconfig /etc/default/privstack-relay\n", "\n700 privstack\n", "\nverified\n",
		"the peer ID, is left in", "cannot access '/usr/bin/privstack-relay'", "\nrelay-identity.key\n",
	} {
		if !strings.Contains("\n"+out, want) {
			t.Errorf("lacks %q:\n%s", want, out)
		}
	}
}

// The files of the apk. Debian has no apk to install it, but the package is three gzip
// streams of tar.
func TestAPKHoldsItsFiles(t *testing.T) {
	out := sh(t, `zcat "$1" | tar -tvi --ignore-zeros -f - | sed 's/  */ /g'; zcat "$1" | tar -xi --ignore-zeros -O -f - .PKGINFO .pre-install`, packageFile(t, "apk"))
	for _, want := range []string{"usr/bin/privstack-relay\n", "etc/init.d/privstack-relay\n", "etc/conf.d/privstack-relay\n", "pkgname = privstack-relay", "adduser -S"} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "systemd/system") {
		t.Errorf("holds a unit, on a system without systemd:\n%s", out)
	}
	sh(t, `tar="$(mktemp)"; zcat "$1" | tar -xi --ignore-zeros -O -f - etc/init.d/privstack-relay >"$tar"; sh -n "$tar"; rm "$tar"`, packageFile(t, "apk"))
}
