//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Real processes on a real network that breaks: every member lives in a network
// namespace of its own. Its peers reach it over one bridge, its clients over a
// second one that is never disturbed, so that what a cut-off member answers is
// seen too.
//
// The namespaces have no names: they live as long as the processes in them and
// the descriptors here, so that whatever ends the test leaves nothing behind.

var (
	chaosDuration = flag.Duration("chaos.duration", 0, "how long TestProcessChaos strikes at random; 0: each fault once")
	chaosSeed     = flag.Uint64("chaos.seed", 0, "what TestProcessChaos draws its faults from; 0: another each time")
)

// A thread of the tests ends only with them (see onThread), so this is no sooner.
func init() { launchAttr.Pdeathsig = syscall.SIGKILL }

// netns is a network namespace, held by its descriptor.
type netns struct{ f *os.File }

const ownNetns = "/proc/thread-self/ns/net"

// newNetns makes an empty namespace. An error says what the machine lacks.
func newNetns() (ns netns, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w (it takes root)", err)
		}
		ns.f, err = os.Open(ownNetns)
		return err
	})
	return ns, err
}

// do runs f inside the namespace. What f starts or dials stays there.
func (ns netns) do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.f.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// onThread runs f on a thread that f may move to another network namespace, and
// takes it back. A thread that cannot go back ends with its goroutine.
func onThread(f func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open(ownNetns)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)
		if err = errors.Join(err, back, home.Close()); back == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// ip runs one ip command for each line, inside the namespace.
func (ns netns) ip(lines string) error {
	return ns.do(func() error {
		for line := range strings.Lines(lines) {
			args := strings.Fields(line)
			if len(args) == 0 {
				continue
			}
			cmd := exec.Command("ip", args...)
			cmd.ExtraFiles = []*os.File{ns.f} // others are named by /proc/PID/fd, which needs no name either
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("ip %s: %w: %s", strings.TrimSpace(line), err, out)
			}
		}
		return nil
	})
}

// netSite is a site whose members have a network each. Member i is 10.1.0.i to
// its peers and 10.2.0.i to its clients.
type netSite struct {
	*site
	hub     netns
	members []netns // of member i+1
	web     *http.Client
}

func clientURL(id int) string { return fmt.Sprintf("http://10.2.0.%d:2379", id) }

func peerAddr(id int) string { return fmt.Sprintf("10.1.0.%d", id) }

// newNetSite builds the network for n members, or skips the test where it cannot.
func newNetSite(t *testing.T, n int, flags ...string) *netSite {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs the program ip (iproute2) to build networks of its own: it is not installed")
	}
	hub, err := newNetns()
	if errors.Is(err, unix.EPERM) {
		t.Skipf("needs root, for networks of its own: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	s := &netSite{hub: hub, site: &site{t: t, dir: t.TempDir(), flags: flags, listed: n, nodes: map[int]*process{}}}
	t.Cleanup(func() {
		for _, ns := range append(s.members, hub) {
			ns.f.Close()
		}
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(hub.ip(`link set lo up
		link add peers type bridge
		link add clients type bridge
		link set peers up
		link set clients up
		addr add 10.2.0.254/24 dev clients`))
	for id := 1; id <= n; id++ {
		ns, err := newNetns()
		must(err)
		s.members = append(s.members, ns)
		for i, bridge := range []string{"peers", "clients"} {
			// The other end is named by a descriptor of this process.
			must(hub.ip(fmt.Sprintf(`link add %[1]s%[2]d type veth peer name %[1]s address %[3]s netns /proc/%[4]d/fd/%[5]d
				link set %[1]s%[2]d master %[1]s
				link set %[1]s%[2]d up`, bridge, id, hardware(i+1, id), os.Getpid(), ns.f.Fd())))
		}
		must(ns.ip(fmt.Sprintf(`link set lo up
			addr add %s/24 dev peers
			addr add 10.2.0.%d/24 dev clients
			link set peers up
			link set clients up`, peerAddr(id), id)))
		s.peers = append(s.peers, "http://"+peerAddr(id)+":2380")
		s.ports = append(s.ports, 2379)
	}
	s.web = &http.Client{Timeout: 1500 * time.Millisecond, Transport: &http.Transport{MaxIdleConnsPerHost: 64, DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = hub.do(func() (err error) { c, err = (&net.Dialer{}).DialContext(ctx, network, addr); return err })
		return c, err
	}}}
	return s
}

// hardware is the address of a member's interface, the same for all runs, so that
// ways to it can be put back (see mend).
func hardware(net, id int) string { return fmt.Sprintf("02:00:00:00:%02d:%02d", net, id) }

func (s *netSite) spawn(id int) *process {
	s.t.Helper()
	program(s.t)
	var p *process
	if err := s.members[id-1].do(func() error { p = s.site.spawn(id); return nil }); err != nil {
		s.t.Fatal(err)
	}
	p.url, p.via = clientURL(id), s.web
	return p
}

func (s *netSite) start(ids ...int) {
	s.t.Helper()
	for _, id := range ids {
		s.spawn(id)
	}
	for _, id := range ids {
		s.nodes[id].ready()
	}
}

func (s *netSite) ids() (ids []int) {
	for i := range s.members {
		ids = append(ids, i+1)
	}
	return ids
}

// cut loses every packet from one member to another, without a word to either:
// the sender believes the receiver to be at a hardware address that nobody has.
func (s *netSite) cut(from, to int) { s.way(from, to, "02:00:00:00:99:99") }

// mend opens the way again.
func (s *netSite) mend(from, to int) { s.way(from, to, hardware(1, to)) }

func (s *netSite) way(from, to int, address string) {
	s.t.Helper()
	err := s.members[from-1].ip(fmt.Sprintf("neigh replace %s lladdr %s dev peers nud permanent", peerAddr(to), address))
	if err != nil {
		s.t.Fatal(err)
	}
}

// link pulls a member's plug, which it notices, or puts it back.
func (s *netSite) link(id int, state string) {
	s.t.Helper()
	if err := s.members[id-1].ip("link set peers " + state); err != nil {
		s.t.Fatal(err)
	}
}

// ways are all ways from members of one group to members of another.
func ways(from, to []int) (out [][2]int) {
	for _, f := range from {
		for _, t := range to {
			if f != t {
				out = append(out, [2]int{f, t})
			}
		}
	}
	return out
}

// chaos is one run of faults on one cluster.
type chaos struct {
	*netSite
	c *clients
	r *rand.Rand
}

// fault is one way in which things go wrong. It strikes, sees the cluster make
// progress, and puts all back.
type fault struct {
	name   string
	strike func(x *chaos)
}

var faults = []fault{
	{"kill the leader", (*chaos).killLeader},
	{"freeze the leader", func(x *chaos) { x.freeze(x.leader()) }},
	{"the leader is deaf", (*chaos).deafLeader},
	{"freeze a follower", func(x *chaos) { x.freeze(x.follower()) }},
	{"the leader is mute", (*chaos).muteLeader},
	{"kill a follower", (*chaos).killFollower},
	{"leader and one follower cannot see each other", (*chaos).triangle},
	{"the leader's plug is pulled", (*chaos).unplugLeader},
	{"a minority with the leader is cut off", (*chaos).minority},
	{"kill all", (*chaos).killEverybody},
}

func (x *chaos) follower() int {
	others := x.others(x.leader())
	return others[x.r.IntN(len(others))]
}

// must is how soon clients have to be served again: an election, and what a busy
// machine adds. What was measured is logged.
const mustResume = 5 * time.Second

// longerThanElection is when a follower that hears nothing has campaigned.
const longerThanElection = 1100 * time.Millisecond

// resumes waits for progress after a fault that began at.
func (x *chaos) resumes(at time.Time, writes int) {
	x.t.Helper()
	x.c.grow(writes)
	gap := x.c.gap(at)
	x.t.Logf("  longest gap between writes %v", gap.Round(time.Millisecond))
	if gap > mustResume {
		x.t.Errorf("no write for %v", gap)
	}
}

// another waits until members of a group follow a leader that is not old.
func (x *chaos) another(old int, group []int) (leader int) {
	x.t.Helper()
	at := time.Now()
	waitFor(x.t, fmt.Sprintf("another leader than %d", old), func() bool {
		for i, id := range group {
			st, err := x.nodes[id].status()
			if err != nil || st.Leader == 0 || int(st.Leader) == old || i > 0 && int(st.Leader) != leader {
				return false
			}
			leader = int(st.Leader)
		}
		return true
	})
	x.t.Logf("  member %d leads after %v", leader, time.Since(at).Round(time.Millisecond))
	return leader
}

// together waits until every member serves linearizable reads.
func (x *chaos) together() {
	x.t.Helper()
	at := time.Now()
	for _, id := range x.ids() {
		x.nodes[id].ready()
	}
	x.leader()
	x.c.expect()
	x.t.Logf("  all serve again %v after the fault ended", time.Since(at).Round(time.Millisecond))
}

func (x *chaos) killLeader() {
	leader := x.leader()
	at := time.Now()
	x.nodes[leader].crash()
	x.resumes(at, 30)
	x.spawn(leader)
}

func (x *chaos) killFollower() {
	id, at := x.follower(), time.Now()
	x.nodes[id].crash()
	x.resumes(at, 30)
	x.spawn(id)
}

func (x *chaos) killEverybody() {
	for _, id := range x.ids() {
		x.nodes[id].signal(syscall.SIGKILL)
	}
	for _, id := range x.ids() {
		x.nodes[id].wait(10 * time.Second)
	}
	for _, id := range x.ids() {
		x.spawn(id)
	}
	x.c.grow(30)
}

// freeze stops a process for longer than an election takes.
func (x *chaos) freeze(id int) {
	x.t.Helper()
	at, leads := time.Now(), x.leader() == id
	x.c.expect(id)
	x.nodes[id].signal(syscall.SIGSTOP)
	if leads {
		x.another(id, x.others(id))
	}
	x.resumes(at, 30)
	for time.Since(at) < longerThanElection {
		x.c.grow(10)
	}
	x.nodes[id].signal(syscall.SIGCONT)
}

// deafLeader: it sends heartbeats and hears no answer. Nobody could ever
// replace it if it did not notice by itself (CheckQuorum).
func (x *chaos) deafLeader() {
	leader := x.leader()
	x.without(leader, ways(x.others(leader), []int{leader}))
}

// muteLeader hears everything and is not heard.
func (x *chaos) muteLeader() {
	leader := x.leader()
	x.without(leader, ways([]int{leader}, x.others(leader)))
}

func (x *chaos) minority() {
	leader := x.leader()
	others := x.others(leader)
	few := append([]int{leader}, others[:(len(others)-1)/2]...)
	rest := others[(len(others)-1)/2:]
	x.t.Logf("  members %v without %v", rest, few)
	x.c.expect(few...)
	x.cutWhile(append(ways(few, rest), ways(rest, few)...), func() {
		at := time.Now()
		x.another(leader, rest)
		x.resumes(at, 30)
	})
}

// without cuts some ways and wants the others to go on without leader.
func (x *chaos) without(leader int, cut [][2]int) {
	x.t.Helper()
	x.c.expect(leader)
	x.cutWhile(cut, func() {
		at := time.Now()
		x.another(leader, x.others(leader))
		x.resumes(at, 30)
		waitFor(x.t, "the old leader to step down", func() bool {
			st, err := x.nodes[leader].status()
			return err == nil && int(st.Leader) != leader
		})
	})
}

func (x *chaos) cutWhile(cut [][2]int, f func()) {
	for _, w := range cut {
		x.cut(w[0], w[1])
	}
	f()
	for _, w := range cut {
		x.mend(w[0], w[1])
	}
}

func (x *chaos) unplugLeader() {
	leader := x.leader()
	at := time.Now()
	x.c.expect(leader)
	x.link(leader, "down")
	x.another(leader, x.others(leader))
	x.resumes(at, 30)
	x.link(leader, "up")
	for _, id := range x.others(leader) { // lost with the link
		x.mend(leader, id)
	}
}

// triangle: one follower does not hear the leader, and both hear all others. It
// must not win an election, nor force one: the others hear their leader (PreVote
// and the lease that CheckQuorum gives).
//
// A machine that stands still for a while may cause an election as well, so that one
// is not held against the cluster; it has to do without in one of three attempts.
func (x *chaos) triangle() {
	for attempt := range 3 {
		leader := x.leader()
		lonely := x.follower()
		before, err := x.nodes[leader].status()
		if err != nil {
			x.t.Fatal(err)
		}
		x.c.expect(lonely)
		x.cutWhile(append(ways([]int{leader}, []int{lonely}), ways([]int{lonely}, []int{leader})...), func() {
			at := time.Now()
			waitFor(x.t, "the follower to miss its leader", func() bool {
				st, err := x.nodes[lonely].status()
				return err == nil && int(st.Leader) != leader
			})
			x.resumes(at, 30)
			for time.Since(at) < longerThanElection+500*time.Millisecond { // it campaigns meanwhile
				x.c.grow(10)
			}
		})
		x.together() // a term that it counted up by itself would end the leader's now
		after, err := x.nodes[leader].status()
		if err == nil && after.Term == before.Term && int(after.Leader) == leader {
			return
		}
		x.t.Logf("  attempt %d: leader %d of term %d became leader %d of term %d (%v)", attempt+1, leader, before.Term, after.Leader, after.Term, err)
	}
	x.t.Error("one follower that does not hear the leader disturbs all")
}

// TestProcessChaos strikes one cluster of five with each fault in turn, while
// clients record what they are told. With -chaos.duration the faults are drawn
// at random, for as long as that.
func TestProcessChaos(t *testing.T) {
	t.Parallel()
	s := newNetSite(t, 5)
	s.start(s.ids()...)
	var urls []string
	for _, id := range s.ids() {
		urls = append(urls, clientURL(id))
	}
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("the same again: go test -run TestProcessChaos -chaos.duration %v -chaos.seed %d .", *chaosDuration, seed)
	r := rand.New(rand.NewPCG(seed, 0))
	began := time.Now()
	strikes := int64(0) // each has keys of its own: a history begins without them
	for done := false; !done; done = *chaosDuration == 0 || time.Since(began) > *chaosDuration || t.Failed() {
		x := &chaos{netSite: s, c: newClients(t, r.Uint64(), strikes, s.web, urls), r: r}
		x.c.grow(30)
		for _, f := range faults {
			if *chaosDuration > 0 {
				f = faults[r.IntN(len(faults))]
			}
			t.Logf("%6.1fs %s", time.Since(began).Seconds(), f.name)
			x.c.round.Store(strikes)
			strikes++
			f.strike(x)
			x.together()
		}
		x.c.verify()
	}
	t.Logf("took %v", time.Since(began).Round(time.Second))
}
